"""UMT5 under transformers' names, in terms of the original release's (wan/modules/t5.py of Wan2.1 and Wan2.2)."""

from __future__ import annotations

from collections.abc import Iterable

_SELF = "encoder.block.N.layer.0"
_FEED = "encoder.block.N.layer.1"

TOP = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    f"{_SELF}.layer_norm": "blocks.N.norm1",
    f"{_SELF}.SelfAttention.q": "blocks.N.attn.q",
    f"{_SELF}.SelfAttention.k": "blocks.N.attn.k",
    f"{_SELF}.SelfAttention.v": "blocks.N.attn.v",
    f"{_SELF}.SelfAttention.o": "blocks.N.attn.o",
    f"{_SELF}.SelfAttention.relative_attention_bias": "blocks.N.pos_embedding.embedding",
    f"{_FEED}.layer_norm": "blocks.N.norm2",
    f"{_FEED}.DenseReluDense.wi_0": "blocks.N.ffn.gate.0",
    f"{_FEED}.DenseReluDense.wi_1": "blocks.N.ffn.fc1",
    f"{_FEED}.DenseReluDense.wo": "blocks.N.ffn.fc2",
}
ALIAS = "encoder.embed_tokens.weight"  # transformers' second name for `shared.weight`
TOKENIZER = "spiece_model"  # ComfyUI keeps the SentencePiece model in the file, as bytes


def prefix_of(keys: Iterable[str]) -> str:
    """What a host put before the text encoder's own names: what stands before the first mark of a block."""
    for key in keys:
        for mark in ("encoder.block.0.layer.0.SelfAttention.q.", "blocks.0.attn.q."):
            at = key.find(mark)
            if at >= 0:
                return key[:at]
    return ""
