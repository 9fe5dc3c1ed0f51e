"""The models that are not transformers and are given as one: recognised by their keys, and told where they belong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from wan_runtime.errors import shown

Part = Literal["text encoder", "VAE", "CLIP image encoder"]

_MARKS: dict[str, tuple[Part, str]] = {
    "encoder.block.0.layer.0.SelfAttention.q.": ("text encoder", "UMT5 under transformers' names"),
    "blocks.0.attn.q.": ("text encoder", "UMT5 under the original release's names"),
    "encoder.downsamples.0.residual.0.gamma": ("VAE", "the Wan2.1 VAE under the original release's names"),
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": (
        "VAE",
        "the Wan2.2 VAE (of TI2V-5B) under the original release's names",
    ),
    "encoder.down_blocks.0.norm1.gamma": ("VAE", "the Wan2.1 VAE under diffusers' names"),
    "encoder.down_blocks.0.resnets.0.norm1.gamma": (
        "VAE",
        "the Wan2.2 VAE (of TI2V-5B) under diffusers' names",
    ),
    "vision_model.embeddings.": ("CLIP image encoder", "CLIP's vision model"),
    "visual.patch_embedding.": (
        "CLIP image encoder",
        "CLIP's vision model under the original release's names",
    ),
}
_PLACES: dict[Part, str] = {
    "text encoder": "Give it with --text-encoder (text_encoder=... in Python).",
    "VAE": "Give it with --vae (vae=... in Python).",
    "CLIP image encoder": "It belongs into the base's image_encoder folder.",
}


def part_of(keys: Iterable[str]) -> tuple[Part, str] | None:
    """Which component a file is, and in words, or None when it is none that is known."""
    for key in keys:
        for mark, found in _MARKS.items():
            if key.startswith(mark) or f".{mark}" in key:
                return found
    return None


def described(keys: Iterable[str]) -> str:
    """What a file is, in words, for a message that says what it is not."""
    keys = list(keys)
    found = part_of(keys)
    if found is not None:
        return f"it is a {found[0]}: {found[1]}. {_PLACES[found[0]]}"
    if any(mark in key for key in keys for mark in (".self_attn.q.", ".attn1.to_q.")):
        return "it is a WAN transformer. Give it with --checkpoint (checkpoint=... in Python)."
    return f"its keys are no known part's: {shown(sorted(keys), 4)}."


def another_model(keys: Iterable[str]) -> str | None:
    """Why a file is no transformer and where it belongs, in words; None when it is nothing that is known."""
    found = part_of(keys)
    if found is None:
        return None
    part, words = found
    return f"this is not a WAN transformer but a {part}: {words}. {_PLACES[part]}"
