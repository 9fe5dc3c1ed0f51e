"""Whether a block under the original names is the release's or DiffSynth-Studio's: by its classes' names, by what its
forwards take, and by its parts. A subclass is not, whatever it changes, nor a fork that adds a part or an argument."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from wan_runtime.residents import original_class


@dataclass(frozen=True)
class Shape:
    """What one host's block looks like: what its forward takes and those of its attentions, what the attentions are
    called, and the parts that it and they have beside the ones of both hosts."""

    block: tuple[str, ...]
    self_attention: tuple[str, ...]
    cross_attention: tuple[str, ...]
    attentions: tuple[str, ...]
    beside: frozenset[str] = frozenset()
    in_attention: frozenset[str] = frozenset()


SHAPES = {
    "WanAttentionBlock": Shape(
        ("x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens"),
        ("x", "seq_lens", "grid_sizes", "freqs"),
        ("x", "context", "context_lens"),
        ("WanSelfAttention", "WanCrossAttention", "WanT2VCrossAttention", "WanI2VCrossAttention"),
    ),
    "DiTBlock": Shape(
        ("x", "context", "t_mod", "freqs"),
        ("x", "freqs"),
        ("x", "y"),
        ("SelfAttention", "CrossAttention"),
        beside=frozenset({"gate"}),
        in_attention=frozenset({"attn"}),
    ),
}
BLOCK = frozenset({"norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn"})
ATTENTION = frozenset({"q", "k", "v", "o", "norm_q", "norm_k"})
IMAGE = frozenset({"k_img", "v_img", "norm_k_img"})


def host_class(block: nn.Module) -> str | None:
    """Which of SHAPES a block is called, or None."""
    name = type(block).__name__
    return name if name in SHAPES else None


def unlike(block: Any) -> str | None:
    """What makes a block another than its name says, in words, or None."""
    name = host_class(block)
    if name is None:
        return f"its blocks are {type(block).__name__}, not {' or '.join(SHAPES)}"
    shape = SHAPES[name]
    one, two = getattr(block, "self_attn", None), getattr(block, "cross_attn", None)
    if one is None or two is None:
        return f"its {name} has no self_attn or no cross_attn"
    image = IMAGE if any(hasattr(two, part) for part in IMAGE) else frozenset()
    attention = ATTENTION | shape.in_attention
    for part, children, wanted in (
        (block, BLOCK | shape.beside, shape.block),
        (one, attention, shape.self_attention),
        (two, attention | image, shape.cross_attention),
    ):
        kind = type(part).__name__
        if part is not block and kind not in shape.attentions:
            return f"its attention is a {kind}, not {' or '.join(shape.attentions)}"
        taken = tuple(inspect.signature(original_class(part).forward).parameters)[1:]
        if taken != wanted:
            return f"the forward of its {kind} takes {', '.join(taken)} and not {', '.join(wanted)}"
        odd = {child for child, _ in part.named_children()} ^ children
        if odd:
            return f"its {kind} has more or fewer parts than the release's: {', '.join(sorted(odd))}"
    return _odd_part(block)


def _odd_part(block: Any) -> str | None:
    modulation, feed = getattr(block, "modulation", None), block.ffn
    if modulation is None or modulation.ndim != 3 or modulation.shape[:2] != (1, 6):
        return "its blocks have no modulation [1, 6, width]"
    width = modulation.shape[2]
    for attention in (block.self_attn, block.cross_attn):
        norms = [norm for name, norm in attention.named_children() if name.startswith("norm_")]
        if any(getattr(n, "weight", None) is None or n.weight.numel() != width for n in norms):
            return "its q and k are not normalised over the whole width"
        heads = getattr(attention, "num_heads", None)
        if not isinstance(heads, int) or width % (2 * heads):
            return f"{heads} heads do not divide its width {width} evenly"
        if tuple(getattr(attention, "window_size", (-1, -1))) != (-1, -1):
            return f"its attention sees a window {attention.window_size}"
    for norm in (block.norm1, block.norm2):
        if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
            return f"its norm1 or norm2 is a {type(norm).__name__} and not a LayerNorm without weights"
    affine = isinstance(block.norm3, nn.LayerNorm) and block.norm3.elementwise_affine
    if not affine and not isinstance(block.norm3, nn.Identity):
        return f"its norm3 is a {type(block.norm3).__name__} and not a LayerNorm with weights"
    gelu = feed[1] if isinstance(feed, nn.Sequential) and len(feed) == 3 else None
    if not isinstance(gelu, nn.GELU) or gelu.approximate != "tanh":
        return "its feed-forward is not Linear, tanh GELU, Linear"
    return None
