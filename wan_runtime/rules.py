"""What every WAN transformer shares, by path in the original names: which Linears to quantise, what stays fp32."""

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


def stored_fp32(tensor: str, rank: int) -> bool:
    """Whether an unquantised tensor is written in fp32: norms, biases, modulation and position embeddings.

    `tensor` is the path with its leaf. They take under a hundredth of a file, and rounding them shows.
    """
    return rank < 2 or not tensor.endswith(".weight")
