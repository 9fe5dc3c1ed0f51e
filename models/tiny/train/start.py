"""Where the VAE's training starts: a coarse picture already passes, in colour.

From random weights a VAE this small learns brightness, shape and motion long before hue, and can stay there.
So its skip connections, which are linear from the input to the latent and from the latent to the output, are
set to carry red, green and blue and their negatives through channels 0 to 5, and a constant through channel
6: silu(x) - silu(-x) = x, and beside a constant an RMS norm is nearly linear. Each latent frame then holds
the 8 x 8 mean colours of its newest frame. All other channels keep their random start and learn the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

COLORS = 6  # +r +g +b -r -g -b
CARRIED = 7  # and a constant
CONSTANT = 3.0


def _clear(conv: Any, rows: slice) -> None:
    """Makes output channels `rows` of a convolution zero."""
    conv.weight[rows] = 0
    conv.bias[rows] = 0


def _tap(conv: Any) -> Tensor:
    """The weight [out, in] at the newest frame and the middle pixel: a view."""
    weight: Tensor = conv.weight
    if weight.dim() == 5:
        weight = weight[:, :, -1]
    return weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]


def _carry(conv: Any) -> None:
    """Passes channels 0 to 6 through unchanged."""
    _clear(conv, slice(CARRIED))
    _tap(conv)[:CARRIED, :CARRIED] = torch.eye(CARRIED)


def _signed(conv: Any, gain: float) -> None:
    """Makes channels 0 to 6 of a half's first convolution from its first three inputs."""
    _clear(conv, slice(CARRIED))
    _tap(conv)[:3, :3] = gain * torch.eye(3)
    _tap(conv)[3:COLORS, :3] = -gain * torch.eye(3)
    conv.bias[COLORS] = CONSTANT


def _unsigned(conv: Any, gain: float) -> None:
    """Makes the first three outputs of a half's last convolution from channels 0 to 5."""
    _clear(conv, slice(3))
    _tap(conv)[:3, :3] = gain * torch.eye(3)
    _tap(conv)[:3, 3:COLORS] = -gain * torch.eye(3)


def _resample(sample: Any) -> None:
    """Down: the mean of 2 x 2 pixels and the newest frame. Up: repeated pixels and frames."""
    conv = next(m for m in sample.resample if isinstance(m, nn.Conv2d))
    _carry(conv)
    if sample.mode.startswith("downsample"):
        _clear(conv, slice(CARRIED))
        for channel in range(
            CARRIED
        ):  # the padding is right and below, so these are the window's first pixels
            conv.weight[channel, channel, :2, :2] = 0.25
    if sample.mode.endswith("3d"):
        time, channels = sample.time_conv, sample.dim
        for first in range(0, time.weight.shape[0], channels):
            _clear(time, slice(first, first + CARRIED))
            _tap(time)[first : first + CARRIED, :CARRIED] = torch.eye(CARRIED)


def _inside(half: Any) -> None:
    """Every block between a half's first and last convolution."""
    for module in half.modules():
        if hasattr(module, "conv_shortcut"):
            _clear(module.conv2, slice(CARRIED))
            if not isinstance(module.conv_shortcut, nn.Identity):
                _carry(module.conv_shortcut)
        elif hasattr(module, "to_qkv"):
            _clear(module.proj, slice(CARRIED))
        elif hasattr(module, "resample"):
            _resample(module)


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Sets the carried channels of an untrained VAE, and makes its latents nearly free of noise."""
    channels = vae.config.z_dim
    _inside(vae.encoder)
    _inside(vae.decoder)
    _signed(vae.encoder.conv_in, 1.0)
    _unsigned(vae.encoder.conv_out, 1.0)
    _clear(vae.quant_conv, slice(3))
    _tap(vae.quant_conv)[:3, :3] = torch.eye(3)
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -6.0
    _clear(vae.post_quant_conv, slice(3))
    _tap(vae.post_quant_conv)[:3, :3] = torch.eye(3)
    _signed(vae.decoder.conv_in, 0.5)
    _unsigned(vae.decoder.conv_out, 1.35)  # what the two norms take away, measured
