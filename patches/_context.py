"""K and V of what a block's cross-attention attends to: text, and image tokens ahead of it."""

from __future__ import annotations

from typing import Any

import torch

from . import _fused
from ._shared import Shared


def keys_values(
    part: _fused.CrossAttention, context: torch.Tensor, image: int, shared: Shared, number: int, kernels: Any
) -> list[_fused.KeysValues]:
    """K and V of a block's context [batch, tokens, width], of which the first `image` tokens are an image's.

    They are kept for the prompts to come where weights alone decide them: no adapter and no hook.
    """

    def make() -> list[_fused.KeysValues]:
        text = _fused.keys_and_values(part.k, part.v, part.norm_k, part.heads, context[:, image:], kernels)
        if part.image is None:
            return [text]
        k, v, norm_k = part.image
        return [text, _fused.keys_and_values(k, v, norm_k, part.heads, context[:, :image], kernels)]

    keep = all(_fused.takes_codes(module) for module in (part.k, part.v, *(part.image or ())[:2]))
    if keep and not torch.compiler.is_compiling():
        return shared.keys_values(number, context, make)
    return make()
