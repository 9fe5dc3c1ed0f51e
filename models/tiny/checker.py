"""Says what a clip shows, by plain image processing, and whether that is what its prompt asked for.

Nothing here is learnt, and the thresholds were fixed on rendered clips before any generated clip was read
(tests/test_checker.py measures them again): the background is the colour of the picture's border, the shape is
what differs from it, its colour is the mean of its inside, its motion is the path of its centre, and its kind
is whichever of four drawn outlines, fitted to its box, overlaps it best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .words import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Scene, parse

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

BACKGROUND_DISTANCE = 0.15  # of RGB in 0..1, between the border's colour and the named one
SHAPE_DISTANCE = 0.2  # of RGB, beyond which a pixel is not background
INSIDE = 0.6  # of a frame's largest distance from the background: its shape's inside, not its soft edge
AREA = (0.006, 0.25)  # of the picture: less is a speck, more is no shape of ours
COLOR_COSINE = 0.955  # between the shape's RGB and the named one: hue and saturation, not shading
MOVED = 0.25  # of the picture's side, along the axis of motion
STILL = 0.06  # and at most, across it, or along both when standing still
STEADY = 0.97  # correlation of place with time
OVERLAP = 0.72  # of shape and outline, intersection over union, mean of all frames
SMALLEST_LARGE = 0.23  # radius, in halves of the picture's side

# Half the width of each shape's box, in radii.
HALF_WIDTH = {"circle": 1.0, "square": 0.88, "triangle": 1.04, "ring": 1.02}


@dataclass(frozen=True)
class Reading:
    """What a clip shows: a name for each attribute, None where it shows none, and the figures behind it."""

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None
    size: str | None
    cosine: float = 0.0
    overlap: float = 0.0
    moved: tuple[float, float] = (0.0, 0.0)


NOTHING = Reading(None, None, None, None, None)


def _pixels(clip: npt.NDArray[np.generic]) -> Array:
    """The clip as float64 [frames, h, w, 3] in 0..1."""
    if clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"a clip is [frames, height, width, 3], and this array is {list(clip.shape)}")
    scale = 255.0 if clip.dtype == np.uint8 else 1.0
    pixels = np.asarray(clip, dtype=np.float64) / scale
    if not np.isfinite(pixels).all() or pixels.min() < -0.01 or pixels.max() > 1.01:
        raise ValueError("a clip's pixels are uint8, or floats in 0..1; these are not")
    return pixels


def _background(pixels: Array) -> Array:
    """The median colour of the four outermost rows and columns of all frames: [3]."""
    edge = np.ones(pixels.shape[1:3], dtype=bool)
    edge[4:-4, 4:-4] = False
    median: Array = np.median(pixels[:, edge].reshape(-1, 3), axis=0)
    return median


def _named_background(color: Array) -> str | None:
    distances = {name: float(np.linalg.norm(color - np.array(rgb))) for name, rgb in BACKGROUNDS.items()}
    name = min(distances, key=lambda n: distances[n])
    return name if distances[name] < BACKGROUND_DISTANCE else None


def _cleaned(mask: Mask) -> Mask:
    """The mask [frames, h, w] without pixels that fewer than 5 of their 3 x 3 neighbourhood belong to."""
    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1), (1, 1)))
    rows, columns = mask.shape[1:]
    count = sum(padded[:, y : y + rows, x : x + columns].astype(np.int16) for y in range(3) for x in range(3))
    kept: Mask = np.asarray(count) >= 5
    return kept


def _masks(pixels: Array, background: Array) -> tuple[Mask, Array]:
    """Where each frame's shape is, [frames, h, w], and every pixel's distance from the background."""
    distance = np.linalg.norm(pixels - background, axis=-1)
    # Half of what the shape's own pixels differ by, so that soft and sharp edges give the same outline.
    strongest = np.percentile(distance.reshape(len(distance), -1), 99.5, axis=1)
    level = np.maximum(SHAPE_DISTANCE, 0.4 * strongest)
    return _cleaned(distance > level[:, None, None]), distance


def _color(pixels: Array, mask: Mask, distance: Array) -> tuple[str | None, float]:
    """The named colour whose direction in RGB is nearest to the inside's mean, and the cosine with it."""
    strongest = np.where(mask, distance, 0.0).max(axis=(1, 2), keepdims=True)
    inside = mask & (distance > INSIDE * strongest)
    mean = pixels[inside].mean(axis=0)
    cosines = {
        name: float(mean @ np.array(rgb) / (np.linalg.norm(mean) * np.linalg.norm(rgb) + 1e-9))
        for name, rgb in COLORS.items()
    }
    name = max(cosines, key=lambda n: cosines[n])
    return (name if cosines[name] > COLOR_COSINE else None), cosines[name]


def _path(mask: Mask) -> Array:
    """The shape's centre in each frame, [frames, 2] as (x, y), in sides of the picture."""
    rows, columns = mask.shape[1:]
    weight = mask.sum(axis=(1, 2))
    x = (mask * (np.arange(columns) + 0.5)).sum(axis=(1, 2)) / weight / columns
    y = (mask * (np.arange(rows)[:, None] + 0.5)).sum(axis=(1, 2)) / weight / rows
    return np.stack([x, y], 1)


def _motion(path: Array) -> tuple[str | None, tuple[float, float]]:
    """The named motion of a path, and how far it went along x and y."""
    ends = max(1, len(path) // 6)
    moved = path[-ends:].mean(axis=0) - path[:ends].mean(axis=0)
    shown = (float(moved[0]), float(moved[1]))
    if np.ptp(path, axis=0).max() < STILL:
        return "standing still", shown
    axis = int(np.abs(moved).argmax())
    steady = abs(float(np.corrcoef(np.arange(len(path)), path[:, axis])[0, 1]))
    if abs(moved[axis]) < MOVED or np.ptp(path[:, 1 - axis]) > STILL or steady < STEADY:
        return None, shown
    step = [0, 0]
    step[axis] = 1 if moved[axis] > 0 else -1
    return next(name for name, direction in MOTIONS.items() if direction == tuple(step)), shown


def _outlines(rows: int, columns: int) -> dict[str, Mask]:
    """The four shapes, each filling a box of this size."""
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    distance = np.hypot(2 * x - 1, 2 * y - 1)
    return {
        "circle": distance < 1,
        "square": np.ones_like(distance, dtype=bool),
        "triangle": np.abs(2 * x - 1) < y,
        "ring": (distance < 1) & (distance > 0.53),
    }


def _box(mask: Mask) -> tuple[slice, slice]:
    """The rows and columns of one frame's shape."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _shape(mask: Mask) -> tuple[str | None, float, float]:
    """The named shape, its overlap with its outline, and its radius in halves of the picture's side."""
    overlaps: dict[str, list[float]] = {name: [] for name in SHAPES}
    widths = []
    for frame in mask:
        box = frame[_box(frame)]
        widths.append(box.shape[1] / frame.shape[1])
        for name, outline in _outlines(*box.shape).items():
            overlaps[name].append(float((box & outline).sum() / (box | outline).sum()))
    means = {name: float(np.mean(values)) for name, values in overlaps.items()}
    name = max(means, key=lambda n: means[n])
    radius = float(np.median(widths)) / HALF_WIDTH[name]
    return (name if means[name] > OVERLAP else None), means[name], radius


def read(clip: npt.NDArray[np.generic]) -> Reading:
    """What a clip [frames, height, width, 3], uint8 or float in 0..1, shows in every one of its frames."""
    pixels = _pixels(clip)
    border = _background(pixels)
    background = _named_background(border)
    mask, distance = _masks(pixels, border)
    areas = mask.mean(axis=(1, 2))
    if areas.min() < AREA[0] or areas.max() > AREA[1]:
        return Reading(None, None, None, background, None)
    color, cosine = _color(pixels, mask, distance)
    motion, moved = _motion(_path(mask))
    shape, overlap, radius = _shape(mask)
    small, large = SIZES
    size = large if radius > SMALLEST_LARGE else small
    return Reading(color, shape, motion, background, size, cosine, overlap, moved)


def wrong(clip: npt.NDArray[np.generic], prompt: str) -> tuple[str, ...]:
    """The attributes in which a clip is not what its prompt says: none of five when it is right."""
    asked, shown = parse(prompt), read(clip)
    return tuple(name for name in Scene._fields if getattr(shown, name) != getattr(asked, name))
