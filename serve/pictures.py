"""A clip's pictures: the thumbnail (its middle frame, as WebP) and the spritesheet (a grid of frames, as JPEG)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from wan_runtime import written_aside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

THUMBNAIL_SIDE = 512  # pixels of the longer side, at most
SPRITE_SIDE = 160
MAX_SPRITES = 25  # in a grid of up to 5 x 5, evenly spread from the first frame to the last


def write_thumbnail(frames: NDArray[np.uint8], path: Path) -> None:
    """Writes the middle one of `frames`, uint8 [F, H, W, 3] in RGB, at `path`, whole or not at all."""
    from PIL import Image

    picture = Image.fromarray(frames[len(frames) // 2])
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    with written_aside(path) as aside:
        picture.save(aside, "WEBP", quality=85)


def write_spritesheet(frames: NDArray[np.uint8], path: Path) -> None:
    """Writes up to 25 of `frames`, uint8 [F, H, W, 3] in RGB, row by row, at `path`, whole or not at all."""
    from PIL import Image

    count = min(len(frames), MAX_SPRITES)
    columns = math.ceil(math.sqrt(count))
    height, width = frames.shape[1:3]
    scale = min(1.0, SPRITE_SIDE / max(height, width))
    cell = max(round(width * scale), 1), max(round(height * scale), 1)
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(count / columns) * cell[1]))
    for place in range(count):
        chosen = round(place * (len(frames) - 1) / max(count - 1, 1))
        row, column = divmod(place, columns)
        sheet.paste(Image.fromarray(frames[chosen]).resize(cell), (column * cell[0], row * cell[1]))
    with written_aside(path) as aside:
        sheet.save(aside, "JPEG", quality=85)
