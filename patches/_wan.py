"""What every WAN transformer shares, in the original release's names: the Linears worth quantising, the fp32 residents."""

from __future__ import annotations

import re

_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.((self_attn|cross_attn)\.(q|k|v|o|k_img|v_img)|ffn\.(0|2))")
# Embeddings, projections and head decide every token at once and hold a few per cent of the weights; norms and
# modulation are added to the residual stream, where bf16 rounding accumulates over the layers.
_FP32 = re.compile(
    r"(patch_embedding|time_embedding|time_projection|text_embedding|img_emb|head)(\..*)?"
    r"|blocks\.\d+(\.(norm\d|(self_attn|cross_attn)\.norm_(q|k|k_img)))?"
)


def swaps(path: str) -> bool:
    """Block attention and feed-forward Linears."""
    return _BLOCK_LINEAR.fullmatch(path) is not None


def fp32(path: str) -> bool:
    """Norms, modulation, and the patch, time, text and image embeddings and the head."""
    return _FP32.fullmatch(path) is not None
