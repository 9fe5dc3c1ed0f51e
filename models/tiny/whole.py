"""The Wan VAE's two halves over a whole clip at once, for training and for drawing many clips.

`AutoencoderKLWan` works in chunks of four frames with a cache, which is right for long videos and slow for
short ones: five times the kernels, 3-D convolutions that no library is fast at, and fp32 norms. Here frames
are folded into the batch, [n * t, c, h, w] in channels-last, and a causal convolution over three frames is a
2-D convolution over their stacked channels. The weights are the same modules and the result is the same
function (a test compares both), at about a sixth of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn


def _history(x: Tensor, frames: int, depth: int) -> Tensor:
    """Each frame's channels behind those of its `depth` predecessors (zeros before the first), oldest first."""
    clip = x.unflatten(0, (-1, frames))
    padded = torch.cat([clip.new_zeros(clip.shape[0], depth, *clip.shape[2:]), clip], 1)
    taps = [padded[:, i : i + frames] for i in range(depth + 1)]
    return torch.cat(taps, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _flat(weight: Tensor) -> Tensor:
    """[o, c, kt, kh, kw] -> [o, kt * c, kh, kw], in the order of `_history`."""
    return weight.transpose(1, 2).flatten(1, 2)


def _conv(conv: Any, x: Tensor, frames: int) -> Tensor:
    """A `WanCausalConv3d` with stride 1."""
    taps, padding = conv.weight.shape[2], conv.weight.shape[3] // 2
    if taps == 1 or frames == 1:  # the only frame has no history: the older taps would multiply zeros
        return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=padding)
    return F.conv2d(_history(x, frames, taps - 1), _flat(conv.weight), conv.bias, padding=padding)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """A `WanRMS_norm` in x's own dtype, its length taken in fp32."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    gain = norm.gamma.view(1, -1, 1, 1) * norm.scale
    scaled: Tensor = x * (1 / length).to(x.dtype) * gain.to(x.dtype)
    return scaled


def _residual(block: Any, x: Tensor, frames: int) -> Tensor:
    """A `WanResidualBlock`."""
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x, frames)
    x = _conv(block.conv1, F.silu(_norm(block.norm1, x)), frames)
    return _conv(block.conv2, F.silu(_norm(block.norm2, x)), frames) + shortcut


def _middle(middle: Any, x: Tensor, frames: int) -> Tensor:
    """A `WanMidBlock`; its attention looks at one frame at a time."""
    x = _residual(middle.resnets[0], x, frames)
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        x = _residual(block, attention(x.unsqueeze(2))[:, :, 0], frames)
    return x


def _shrink(sample: Any, x: Tensor, frames: int) -> tuple[Tensor, int]:
    """A `WanResample` of the encoder; in time the first frame stays and each further pair becomes one."""
    x = sample.resample(x)
    if sample.mode != "downsample3d" or frames == 1:
        return x, frames
    clip = x.unflatten(0, (-1, frames))
    triples = torch.cat([clip[:, 0:-2:2], clip[:, 1:-1:2], clip[:, 2::2]], 2)
    shorter = F.conv2d(triples.flatten(0, 1), _flat(sample.time_conv.weight), sample.time_conv.bias)
    clip = torch.cat([clip[:, :1], shorter.unflatten(0, (len(clip), -1)).to(clip.dtype)], 1)
    return clip.flatten(0, 1).contiguous(memory_format=torch.channels_last), clip.shape[1]


def _grow(sample: Any, x: Tensor, frames: int) -> tuple[Tensor, int]:
    """A `WanResample` of the decoder; in time the first frame stays and each further one becomes two."""
    if sample.mode == "upsample3d" and frames > 1:
        clip = x.unflatten(0, (-1, frames))
        rest = _history(clip[:, 1:].flatten(0, 1), frames - 1, 2)
        pairs = F.conv2d(rest, _flat(sample.time_conv.weight), sample.time_conv.bias)
        pairs = pairs.unflatten(1, (2, -1)).flatten(0, 1).unflatten(0, (len(clip), -1))
        clip = torch.cat([clip[:, :1], pairs.to(clip.dtype)], 1)
        frames = clip.shape[1]
        x = clip.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return sample.resample(x), frames


def encode(vae: AutoencoderKLWan, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, each [n, 16, 1 + (f - 1) / 4, h / 8, w / 8], of a clip [n, 3, f, h, w]."""
    half, n, frames = vae.encoder, clip.shape[0], clip.shape[2]
    x = clip.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = _conv(half.conv_in, x, frames)
    for layer in half.down_blocks:
        if hasattr(layer, "resample"):
            x, frames = _shrink(layer, x, frames)
        else:
            x = _residual(layer, x, frames)
    x = _middle(half.mid_block, x, frames)
    x = _conv(half.conv_out, F.silu(_norm(half.norm_out, x)), frames)
    moments = _conv(vae.quant_conv, x, frames).float().unflatten(0, (n, -1)).transpose(1, 2)
    mean, log_variance = moments.chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """The clip of a latent [n, 16, t, h, w], not clamped: a clamped pixel has no gradient."""
    half, n, frames = vae.decoder, latent.shape[0], latent.shape[2]
    x = latent.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = _conv(half.conv_in, _conv(vae.post_quant_conv, x, frames), frames)
    x = _middle(half.mid_block, x, frames)
    for block in half.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, frames)
        if block.upsamplers is not None:
            x, frames = _grow(block.upsamplers[0], x, frames)
    x = _conv(half.conv_out, F.silu(_norm(half.norm_out, x)), frames)
    clip: Tensor = x.float().unflatten(0, (n, -1)).transpose(1, 2)
    return clip
