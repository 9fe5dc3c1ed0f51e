"""What every WAN transformer shares, by path in the original names: which Linears to quantise, what stays fp32."""

from __future__ import annotations

import re

_BLOCK = r"(vace_)?blocks\.\d+"
_BLOCK_LINEAR = re.compile(rf"{_BLOCK}\.((self_attn|cross_attn)\.(q|k|v|o|k_img|v_img)|ffn\.(0|2))")
# Embeddings, projections and head decide every token at once and hold a few per cent of the weights; norms and
# modulation are added to the residual stream, where bf16 rounding accumulates over the layers. The motion encoder's
# activations end in a QR decomposition.
_FP32 = re.compile(
    r"((vace_|pose_)?patch_embedding|time_embedding|time_projection|text_embedding|img_emb|head)(\..*)?"
    r"|(motion_encoder|face_encoder|ref_conv|control_adapter|cond_encoder|trainable_cond_mask)(\..*)?"
    r"|face_adapter\.fuser_blocks\.\d+\.(q_norm|k_norm|pre_norm_\w+)"
    r"|(casual_audio_encoder|frame_packer|audio_proj)(\..*)?|audio_injector\..*norm\w*(\..*)?"
    rf"|{_BLOCK}(\.(norm\d|(self_attn|cross_attn)\.norm_(q|k|k_img)))?"
)
# Branches with parameters of their own beside their modules': in fp32 those would lift what comes after to fp32 too.
_WHOLE = ("img_emb", "motion_encoder", "face_encoder")


def swaps(path: str) -> bool:
    """Block attention and feed-forward Linears, VACE's own blocks among them."""
    return _BLOCK_LINEAR.fullmatch(path) is not None


def fp32(path: str) -> bool:
    """Norms, modulation, and the patch, time, text, image, motion and face embeddings and the head."""
    return _FP32.fullmatch(path) is not None


def whole(path: str) -> bool:
    """A branch that is computed in fp32 from its first input to its last output, casting at its own edges."""
    return path in _WHOLE


def stored_fp32(tensor: str, rank: int) -> bool:
    """Whether an unquantised tensor is written in fp32: norms, biases, modulation and position embeddings.

    `tensor` is the path with its leaf. They take under a hundredth of a file, and rounding them shows.
    """
    return rank < 2 or not tensor.endswith(".weight")
