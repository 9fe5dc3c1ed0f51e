"""A patch embedding as a product of patches: its result lies token after token, as blocks read it.

A convolution's lies channel after channel, and is passed over twice more: for its bias, and to be laid out by tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_runtime.fp32_products import product
from wan_runtime.residents import Resident, become, kind_of

MEMO = "_wan_runtime_reader"  # of a fused patch embedding: (the block that reads it,)
# Of each patch embedding the blocks whose first reads it.
READERS = {"patch_embedding": "blocks", "vace_patch_embedding": "vace_blocks"}


class FusedPatches(Resident):
    """A convolution whose patches lie side by side and do not overlap."""

    kernel_size: tuple[int, int, int]

    def result(self, x: torch.Tensor) -> Any:
        """Of video [batch, channels, frames, height, width]."""
        # An adapter makes its own convolution of this class, and no block reads what that gives.
        (reader,) = self.__dict__.get(MEMO, (None,))
        # Laid out by tokens, the batch of one clip has another stride than in what a block gives, and a compiled block
        # would be compiled a second time for that.
        eager = (
            reader is not None and reader._compiled_call_impl is None and not torch.compiler.is_compiling()
        )
        if not eager or not _whole(x, self.kernel_size):
            return super().result(x)
        rows = flat_patches(x, self.kernel_size)
        return product(rows, self.weight.flatten(1), self.bias).movedim(-1, 1)


def _whole(x: torch.Tensor, size: tuple[int, int, int]) -> bool:
    """Whether an input has a batch and at least one patch; a convolution knows what to do with others."""
    return x.dim() == 5 and all(side >= patch for side, patch in zip(x.shape[2:], size, strict=True))


def tiles(module: nn.Module) -> bool:
    """Whether a module is a convolution over patches side by side."""
    return (
        isinstance(module, nn.Conv3d)
        and module.stride == module.kernel_size
        and module.padding == (0, 0, 0)
        and module.dilation == (1, 1, 1)
        and module.groups == 1
    )


def flat_patches(video: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """The patches of video [batch, channels, frames, height, width], each flat as the weight that it meets is:
    [batch, t, h, w, values]. What is left over at the end of a side is left out, as a convolution leaves it.
    """
    batch, channels = video.shape[:2]
    (t, h, w), (pt, ph, pw) = [side // patch for side, patch in zip(video.shape[2:], size, strict=True)], size
    whole = video[:, :, : t * pt, : h * ph, : w * pw]
    parted = whole.reshape(batch, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return parted.reshape(batch, t, h, w, channels * pt * ph * pw)


def fuse(model: nn.Module) -> None:
    """Make a patched model's patch embeddings products; what is no fp32 convolution of that kind stays as it is."""
    for name, blocks in READERS.items():
        embedding, readers = getattr(model, name, None), getattr(model, blocks, None)
        if not isinstance(embedding, nn.Module) or not isinstance(readers, nn.ModuleList) or not len(readers):
            continue
        if kind_of(embedding) == "resident" and tiles(embedding):
            become(embedding, FusedPatches)
            embedding.__dict__[MEMO] = (readers[0],)


def unfuse(module: nn.Module) -> None:
    """Undo `fuse`."""
    if module.__dict__.pop(MEMO, None) is not None and kind_of(module) is FusedPatches:
        become(module, "resident")
