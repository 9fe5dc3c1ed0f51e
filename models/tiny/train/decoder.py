"""The decoder alone, taught to draw clean clips from latents that are a little off, as a transformer's always are.

The encoder stays as it is, so a transformer trained on its latents stays right, and needs no step more. Half of each
batch are scenes in the proportions that the transformer studies, the other half crowds, as for the VAE.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from .. import whole
from . import scenes
from .vae import VaeOptions, build, descend, draw, make_step, optimiser, reconstruction


@dataclass(frozen=True)
class DecoderOptions:
    """The peak rate, and the most noise that is put on a clip's latents, in standard deviations of its channels."""

    peak: float = 3e-4
    noise: float = 0.35


def losses(vae: AutoencoderKLWan, clip: Tensor, noise: float) -> dict[str, Tensor]:
    """The terms of the loss for a clip [n, 3, f, h, w] in -1..1, each decoded with 0 to `noise` on its latents."""
    with torch.no_grad():
        latents = whole.encode(vae, clip)[0]
        spread = latents.std((0, 2, 3, 4), keepdim=True) * noise * torch.rand_like(latents[:, :1, :1, :1, :1])
        off = latents + spread * torch.randn_like(latents)
    return reconstruction(whole.decode(vae, off), clip)


def train(
    seconds: float, weights: Path, device: torch.device, batches: VaeOptions, options: DecoderOptions
) -> None:
    """Trains the decoder of the VAE in the file `weights` for `seconds`, and writes it back there in fp32."""
    torch.manual_seed(3)
    generator = torch.Generator(device).manual_seed(3)
    vae = build()
    vae.load_state_dict(load_file(weights))
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    vae.to(device)
    opt = optimiser(vae)
    clip = draw(generator, batches, scenes.study)
    update = make_step(vae, opt, clip, lambda vae, clip: losses(vae, clip, options.noise))

    def step() -> dict[str, Tensor]:
        clip.copy_(draw(generator, batches, scenes.study))
        return update()

    descend("decoder", seconds, opt, step, options.peak)
    vae.eval().save_pretrained(weights.parent)
