"""The words of the tiny model's prompts, and what they look like: all that it can be asked to draw."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

RGB = tuple[float, float, float]

COLORS: dict[str, RGB] = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.75, 0.2),
    "blue": (0.15, 0.3, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "orange": (1.0, 0.55, 0.05),
    "purple": (0.6, 0.15, 0.8),
    "cyan": (0.1, 0.85, 0.9),
    "pink": (1.0, 0.5, 0.75),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring")
MOTIONS: dict[str, tuple[int, int]] = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "standing still": (0, 0),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (0.03, 0.03, 0.03),
    "white": (0.95, 0.95, 0.95),
    "gray": (0.5, 0.5, 0.5),
    "navy": (0.05, 0.08, 0.3),
}
SIZES: dict[str, float] = {"small": 0.17, "large": 0.3}


class Scene(NamedTuple):
    """What one clip shows, by name."""

    color: str
    shape: str
    motion: str
    background: str
    size: str


CLASSES: tuple[Collection[str], ...] = (COLORS, SHAPES, MOTIONS, BACKGROUNDS, SIZES)


def named(classes: list[int]) -> Scene:
    """The scene of five class numbers, one for each field of `Scene`."""
    return Scene(*(list(names)[i] for names, i in zip(CLASSES, classes, strict=True)))


def prompt(scene: Scene) -> str:
    """The one sentence that describes a scene."""
    color, shape, motion, background, size = scene
    return f"a {size} {color} {shape} {motion} on a {background} background"


def parse(text: str) -> Scene:
    """The scene that `prompt` made `text` from; anything else is a ValueError with what was expected."""
    for classes in itertools.product(*(range(len(names)) for names in CLASSES)):
        scene = named(list(classes))
        if prompt(scene) == text:
            return scene
    raise ValueError(
        f"{text!r} is not a prompt of the tiny model; they read 'a SIZE COLOR SHAPE MOTION on a BACKGROUND "
        f"background', with {', '.join('/'.join(names) for names in CLASSES)}"
    )
