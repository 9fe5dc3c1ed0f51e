"""What a clip looks like while it is made: its estimated latents as a small JPEG, by one linear map to RGB.

The map is fitted when the model is warmed up, to what this VAE itself makes of coloured pictures, so it holds for any
VAE. Of a scheduler that keeps its estimate of the finished latents (UniPC and DPM++, which Wan's pipelines use) that
estimate is shown; another shows no previews.
"""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass
from typing import Any

SIDE = 192  # pixels of the longer side
EVERY_SECONDS = 0.5
PATCHES = 12  # coloured squares in a row of the picture that the map is fitted to
PATCH = 4  # latents in a row of one square, so that its middle knows nothing of its neighbours


@dataclass(frozen=True)
class Map:
    """From normalised latents to RGB in 0 to 1: `weights` [C + 1, 3], the last row being the constant."""

    weights: Any


def fit(pipe: Any) -> Map:
    """Fits the map of a pipeline's VAE, by least squares over squares of random colours."""
    import torch

    vae = pipe.vae
    scale = int(pipe.vae_scale_factor_spatial)
    colours = torch.rand(PATCHES, PATCHES, 3, generator=torch.Generator("cpu").manual_seed(0))
    picture = colours.permute(2, 0, 1).repeat_interleave(PATCH * scale, 1).repeat_interleave(PATCH * scale, 2)
    with torch.no_grad():
        given = (picture * 2 - 1)[None, :, None].to(vae.device, vae.dtype)
        latents = vae.encode(given).latent_dist.mode().float().cpu()[0, :, 0]
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    channels = latents.shape[0]
    squares = ((latents - mean) / std).reshape(channels, PATCHES, PATCH, PATCHES, PATCH)
    middle = squares[:, :, 1:3, :, 1:3].mean((2, 4)).reshape(channels, -1).T
    known = torch.cat([middle, torch.ones(len(middle), 1)], 1)
    return Map(torch.linalg.lstsq(known, colours.reshape(-1, 3)).solution)


def to_rgb(mapping: Map, latents: Any) -> Any:
    """The middle frame of normalised latents [1, C, T, h, w] as uint8 [h, w, 3]."""
    import torch

    frame = latents[0, :, latents.shape[2] // 2].float().cpu()
    flat = torch.cat([frame.flatten(1).T, torch.ones(frame[0].numel(), 1)], 1) @ mapping.weights
    return (flat * 255).round().clamp(0, 255).to(torch.uint8).reshape(*frame.shape[1:], 3).numpy()


def as_jpeg(pixels: Any) -> str:
    """A picture, uint8 [h, w, 3], enlarged to 192 pixels, as a data URL."""
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    picture = Image.fromarray(pixels).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
    )
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


class Previews:
    """Makes previews of one clip, not more often than every half second."""

    def __init__(self, mapping: Map) -> None:
        self._map, self._last = mapping, 0.0

    def take(self, pipe: Any) -> str | None:
        """A preview of what the pipeline's scheduler now expects, or None where it is too soon or keeps nothing."""
        kept = getattr(pipe.scheduler, "model_outputs", None)
        if not kept or kept[-1] is None or time.monotonic() - self._last < EVERY_SECONDS:
            return None
        self._last = time.monotonic()
        return as_jpeg(to_rgb(self._map, kept[-1]))
