"""Draws clips of the tiny model for a list of asks: the prompts and seeds that every figure is taken from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import whole, words

Frames = npt.NDArray[np.uint8]
SIDE = 128
FRAMES = 17
GUIDANCE = 3.0  # of 1.5 to 4, what drew most of 200 prompts right that no figure is taken from
ORDER = 2026  # shuffles the scenes, so that the first N are a fair sample for every N


@dataclass(frozen=True)
class Ask:
    """One clip: what it is to show, and the seed of its first noise."""

    prompt: str
    seed: int


def asks(count: int) -> list[Ask]:
    """The first `count` of the 1,280 scenes in a fixed random order, each with a seed of its own."""
    scenes = [words.Scene(*names) for names in itertools.product(*words.CLASSES)]
    if not 1 <= count <= len(scenes):
        raise ValueError(
            f"count is {count}; there are {len(scenes)} different prompts, so give 1 to {len(scenes)}."
        )
    random.Random(ORDER).shuffle(scenes)
    return [Ask(words.prompt(scene), 1000 + i) for i, scene in enumerate(scenes[:count])]


def latents(pipe: Any, batch: list[Ask], steps: int) -> torch.Tensor:
    """What the VAE is to decode, fp32 [n, 16, 5, 16, 16]: each clip the same whatever else is in its batch."""
    drawn = pipe(
        [ask.prompt for ask in batch],
        negative_prompt=[""] * len(batch),
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(ask.seed) for ask in batch],
        output_type="latent",
    ).frames
    config = pipe.vae.config
    mean, std = (torch.tensor(v, device=drawn.device) for v in (config.latents_mean, config.latents_std))
    normal: torch.Tensor = drawn.float()
    return normal * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)


@torch.no_grad()
def decode(pipe: Any, latent: torch.Tensor) -> Frames:
    """The clips of what `latents` gives, as `pixels` gives them."""
    return pixels(whole.decode(pipe.vae, latent))


def pixels(clips: torch.Tensor) -> Frames:
    """[n, 3, f, h, w] in -1..1 -> uint8 [n, f, h, w, 3]; what is not finite becomes black, and reads as nothing."""
    finite = clips.nan_to_num(-1.0, 1.0, -1.0).clamp(-1, 1)
    frames: Frames = ((finite + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
    return frames


def draw(
    pipe: Any, wanted: list[Ask], steps: int, batch: int = 1, drawn: Callable[[int], None] | None = None
) -> list[Frames]:
    """One clip, uint8 [17, 128, 128, 3], for each ask; `drawn(n)` is called after each batch of n.

    The pipeline's own decoder works in chunks of four frames; the whole clip at once is the same function and a
    third of the time.
    """
    clips: list[Frames] = []
    for part in _parts(wanted, batch):
        clips.extend(decode(pipe, latents(pipe, part, steps)))
        if drawn is not None:
            drawn(len(part))
    return clips


def _parts(wanted: list[Ask], size: int) -> Iterable[list[Ask]]:
    return (wanted[i : i + size] for i in range(0, len(wanted), size))
