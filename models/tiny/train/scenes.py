"""Procedural clips of one moving shape, each with the prompt that describes it.

A scene is five class numbers, in the order of `Scene`'s fields. Everything random about a clip beyond its
scene (where it starts, how far it moves, its exact size) comes from the generator that `render` is given.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..words import BACKGROUNDS, CLASSES, COLORS, MOTIONS, RGB, SHAPES, SIZES

FRAMES = 17
RESOLUTION = 128


def sample(count: int, generator: torch.Generator) -> Tensor:
    """Class numbers of `count` random scenes: int64 [count, 5], on the generator's device."""
    device = generator.device
    columns = [torch.randint(len(names), (count,), generator=generator, device=device) for names in CLASSES]
    return torch.stack(columns, 1)


def study(count: int, generator: torch.Generator) -> Tensor:
    """Scenes to train a transformer on, int64 [count, 5]: as `sample` draws them, and every fourth a small triangle or
    ring. Those have the finest detail for their size, and were all that a model trained on fair samples got wrong."""
    classes = sample(count, generator)
    hard = classes[::4]
    fine = torch.tensor([SHAPES.index("triangle"), SHAPES.index("ring")], device=generator.device)
    hard[:, 1] = fine[torch.randint(2, (len(hard),), generator=generator, device=generator.device)]
    hard[:, 4] = list(SIZES).index("small")
    return classes


def _trajectory(
    classes: Tensor, generator: torch.Generator, frames: int, spread: float
) -> tuple[Tensor, Tensor]:
    """Centres [n, frames, 2] as (x, y) and radii [n], in units of half the picture."""
    device = classes.device
    velocity = torch.tensor(list(MOTIONS.values()), device=device)[classes[:, 2]].float()
    radius = torch.tensor(list(SIZES.values()), device=device)[classes[:, 4]]
    chance = torch.rand(len(classes), 4, generator=generator, device=device)
    span = 0.7 + 0.3 * chance[:, 2:3]
    start = torch.where(velocity != 0, -velocity * span / 2, (chance[:, :2] - 0.5) * 0.7)
    if spread:
        start = start + (torch.rand(len(classes), 2, generator=generator, device=device) - 0.5) * spread
    time = torch.linspace(0, 1, frames, device=device)
    centre = start[:, None] + (velocity * span)[:, None] * time[None, :, None]
    return centre, radius * (0.92 + 0.16 * chance[:, 3])


def _layer(
    classes: Tensor, generator: torch.Generator, frames: int, resolution: int, spread: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Coverage and shade of each scene's shape, both [n, 1, frames, resolution, resolution]."""
    device, n = classes.device, len(classes)
    centre, radius = _trajectory(classes, generator, frames, spread)
    axis = torch.linspace(-1, 1, resolution, device=device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dx = x[None, None] - centre[..., 0, None, None]
    dy = y[None, None] - centre[..., 1, None, None]
    r = radius[:, None, None, None]
    distance = (dx**2 + dy**2).sqrt()
    # Signed distances in the order of SHAPES: negative inside.
    circle = distance - r
    square = torch.maximum(dx.abs(), dy.abs()) - r * 0.88
    triangle = torch.maximum(dy - r * 0.6, (dx.abs() * 0.866 - dy * 0.5) - r * 0.6)
    ring = (distance - r * 0.78).abs() - r * 0.24
    signed = torch.stack([circle, square, triangle, ring], 0)
    signed = signed.gather(0, classes[:, 1].view(1, n, 1, 1, 1).expand(1, n, *signed.shape[2:]))[0]
    lit = ((dx + r * 0.3) ** 2 + (dy + r * 0.3) ** 2).sqrt()
    shade = (1.05 - 0.35 * lit / (r * 1.3)).clamp(0.55, 1.05)
    return torch.sigmoid(-signed * resolution * 0.6)[:, None], shade[:, None]


def _table(colors: Collection[RGB], classes: Tensor) -> Tensor:
    """RGB of each class: [n, 3, 1, 1, 1]."""
    return torch.tensor(list(colors), device=classes.device)[classes].view(-1, 3, 1, 1, 1)


def render(
    classes: Tensor, generator: torch.Generator, frames: int = FRAMES, resolution: int = RESOLUTION
) -> Tensor:
    """Draws scenes: int64 [n, 5] -> float32 [n, 3, frames, resolution, resolution] in -1..1."""
    color, background = _table(COLORS.values(), classes[:, 0]), _table(BACKGROUNDS.values(), classes[:, 3])
    alpha, shade = _layer(classes, generator, frames, resolution)
    picture = background * (1 - alpha) + color * shade * alpha
    return picture.clamp(0, 1) * 2 - 1


def crowd(
    count: int,
    generator: torch.Generator,
    frames: int = FRAMES,
    resolution: int = RESOLUTION,
    shapes: int = 6,
) -> Tensor:
    """Clips [count, 3, frames, resolution, resolution] of many shapes in any colour, to train the VAE on.

    In a scene the shape covers a few percent of the picture, and a VAE that draws it in the wrong hue still
    has 28 dB: trained on scenes alone it kept one axis of colour out of two. Here colour is everywhere.
    """
    device = generator.device
    picture = torch.rand(count, 3, 1, 1, 1, generator=generator, device=device)
    for _ in range(shapes):
        classes = sample(count, generator)
        alpha, shade = _layer(classes, generator, frames, resolution, spread=1.4)
        color = torch.rand(count, 3, 1, 1, 1, generator=generator, device=device)
        named_color = torch.rand(count, 1, 1, 1, 1, generator=generator, device=device) < 0.5
        color = torch.where(named_color, _table(COLORS.values(), classes[:, 0]), color)
        picture = picture * (1 - alpha) + color * shade * alpha
    return picture.clamp(0, 1) * 2 - 1
