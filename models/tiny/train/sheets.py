"""Pictures to look at after training: what the VAE does to clips, and what the pipeline draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from .. import drawing, whole
from . import scenes

PROMPTS = [
    "a large red circle moving right on a black background",
    "a small yellow square moving up on a navy background",
    "a large purple triangle moving down on a white background",
    "a large cyan ring standing still on a gray background",
    "a small orange circle moving left on a black background",
    "a large green square moving right on a white background",
]


@torch.no_grad()
def vae_sheet(vae: AutoencoderKLWan, path: Path, count: int = 6) -> None:
    """Unseen clips (left of each pair) beside the VAE's reconstruction (right), at three times."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(20_002)
    clip = scenes.render(scenes.sample(count, generator), generator)
    drawn = whole.decode(vae, whole.encode(vae, clip)[0]).clamp(-1, 1)
    pairs = [torch.cat([clip[:, :, i], drawn[:, :, i]], 3) for i in (0, 8, 16)]
    rows = torch.cat(pairs, 3)  # [count, 3, h, 6 w]
    sheet = torch.cat(list(rows), 1).permute(1, 2, 0)
    Image.fromarray(((sheet.float().cpu().numpy() + 1) * 127.5).round().astype(np.uint8)).save(path)


def sample_sheet(clips: list[drawing.Frames], path: Path) -> None:
    """Five frames of each clip, uint8 [17, 128, 128, 3], one row a clip."""
    rows = [np.concatenate([clip[i] for i in (0, 4, 8, 12, 16)], 1) for clip in clips]
    Image.fromarray(np.concatenate(rows, 0)).save(path)
