"""The contact sheet: a row for each prompt, a column for each reading of the weights, three frames of every clip."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .drawing import Frames

TILE = 128
TIMES = (1, 8, 15)  # near the beginning, in the middle, near the end
GAP = 3  # between frames of one clip
MARGIN = 18  # around the sheet and between columns
HEADER, CAPTION = 40, 26
INK, PAPER, LINE = (20, 20, 20), (255, 255, 255), (205, 205, 205)


def contact_sheet(prompts: list[str], columns: dict[str, list[Frames]]) -> Image.Image:
    """Draws `columns`, label -> one clip uint8 [17, 128, 128, 3] for each prompt."""
    wide = len(TIMES) * TILE + (len(TIMES) - 1) * GAP
    high = CAPTION + TILE
    size = (MARGIN + len(columns) * (wide + MARGIN), HEADER + len(prompts) * (high + GAP) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    title, text = ImageFont.load_default(size=22), ImageFont.load_default(size=16)
    for number, (label, clips) in enumerate(columns.items()):
        left = MARGIN + number * (wide + MARGIN)
        pen.text((left + wide / 2, HEADER / 2 + 4), label, INK, title, anchor="mm")
        for row, clip in enumerate(clips):
            top = HEADER + row * (high + GAP) + CAPTION
            sheet.paste(Image.fromarray(_strip(clip)), (left, top))
            pen.rectangle((left - 1, top - 1, left + wide, top + TILE), outline=LINE)
    for row, prompt in enumerate(prompts):
        pen.text((MARGIN, HEADER + row * (high + GAP) + CAPTION / 2), prompt, INK, text, anchor="lm")
    return sheet


def _strip(clip: Frames) -> Frames:
    """Three frames side by side."""
    gap = np.full((TILE, GAP, 3), 255, np.uint8)
    parts = [part for time in TIMES for part in (clip[time], gap)][:-1]
    return np.concatenate(parts, 1)
