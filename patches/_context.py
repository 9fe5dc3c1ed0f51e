"""K and V of what a block's cross-attention attends to: text, and image tokens ahead of it."""

from __future__ import annotations

from typing import Any

import torch

from . import _fused
from ._shared import Shared
from ._snapshot import held


def keys_values(
    part: _fused.CrossAttention, context: torch.Tensor, image: int, shared: Shared, number: int, kernels: Any
) -> list[_fused.KeysValues]:
    """K and V of a block's context [batch, tokens, width], of which the first `image` tokens are an image's.

    They are kept for the steps to come where weights alone decide them (no adapter and no hook), and until one of
    those is written.
    """

    def make() -> list[_fused.KeysValues]:
        text = _fused.keys_and_values(part.k, part.v, part.norm_k, part.heads, context[:, image:], kernels)
        if part.image is None or not image:  # without keys attention gives zeros
            return [text]
        k, v, norm_k = part.image
        return [text, _fused.keys_and_values(k, v, norm_k, part.heads, context[:, :image], kernels)]

    image_k_v, image_norm = ((), ()) if part.image is None else (part.image[:2], part.image[2:])
    linears = (part.k, part.v, *image_k_v)
    if torch.compiler.is_compiling() or not all(_fused.takes_codes(linear) for linear in linears):
        return make()
    return shared.keys_values(number, context, held(*linears, part.norm_k, *image_norm), make)
