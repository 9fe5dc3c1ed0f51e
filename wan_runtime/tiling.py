"""A convolution whose patches do not overlap, as a product of its patches.

Each patch is a row, so the result lies token after token, as the blocks read it: no pass lays it out anew.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn


def tiles(module: nn.Module) -> TypeGuard[nn.Conv3d]:
    """Whether a module is a convolution over patches side by side, as every patch embedding of WAN is."""
    return (
        isinstance(module, nn.Conv3d)
        and module.stride == module.kernel_size
        and module.padding == (0, 0, 0)
        and module.dilation == (1, 1, 1)
        and module.groups == 1
    )


def patches(conv: nn.Conv3d, video: torch.Tensor) -> torch.Tensor:
    """The patches of video [batch, channels, frames, height, width] that a convolution takes, each flat as its weight
    is: [batch, t, h, w, values]. What is left over at the end of a side is left out, as a convolution leaves it.
    """
    batch, channels = video.shape[:2]
    counts = [size // patch for size, patch in zip(video.shape[2:], conv.kernel_size, strict=True)]
    (t, h, w), (pt, ph, pw) = counts, conv.kernel_size
    whole = video[:, :, : t * pt, : h * ph, : w * pw]
    parted = whole.reshape(batch, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return parted.reshape(batch, t, h, w, channels * pt * ph * pw)
