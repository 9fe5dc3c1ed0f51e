"""Whether a block of diffusers' still computes what the kernels stand for: its classes' own forwards, norms with and
without weights where WAN has them, a tanh GELU, no dropout. A fork's subclass may change any, and so may a script."""

from __future__ import annotations

from typing import Any

from torch import nn

from wan_runtime.residents import original_class

CLASSES = ("WanTransformerBlock", "WanVACETransformerBlock")
LIBRARIES = ("diffusers", "torch")


def is_block(module: nn.Module) -> bool:
    """Whether a module is a WAN block of diffusers', or a subclass of one."""
    return any(cls.__name__ in CLASSES and _library(cls) == "diffusers" for cls in type(module).__mro__)


def unlike(block: Any) -> str | None:
    """What makes a block compute something else than diffusers' does, in words, or None."""
    one, two, feed = block.attn1, block.attn2, block.ffn
    parts = (block, one, two, feed, feed.net[0], block.norm1, block.norm2, block.norm3, *norms(block))
    foreign = next((part for part in parts if _library(_forward(part)) not in LIBRARIES), None)
    if foreign is None and _forward(block).__qualname__.partition(".")[0] not in CLASSES:
        foreign = block
    if foreign is not None:
        return f"its {type(foreign).__name__} has a forward of its own"
    return _odd_norm(block) or _odd_feed(block)


def _odd_norm(block: Any) -> str | None:
    for norm in norms(block):
        weight = getattr(norm, "weight", None)
        if weight is None or weight.shape != block.scale_shift_table.shape[-1:]:
            return (
                f"its q or k is normalised by {type(norm).__name__}, which is no RMSNorm over the whole width"
            )
    for norm in (block.norm1, block.norm3):
        if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine:
            return f"its norm1 or norm3 is a {type(norm).__name__} and not a LayerNorm without weights"
    norm2 = block.norm2
    affine = isinstance(norm2, nn.LayerNorm) and norm2.weight is not None and norm2.bias is not None
    if not affine and not isinstance(norm2, nn.Identity):
        return f"its norm2 is a {type(norm2).__name__} and not a LayerNorm with weights"
    return None


def _odd_feed(block: Any) -> str | None:
    net = block.ffn.net
    if getattr(net[0], "approximate", None) != "tanh":
        return "its feed-forward is not Linear, tanh GELU, Linear"
    if any(getattr(dropout, "p", 0) for dropout in (block.attn1.to_out[1], block.attn2.to_out[1], net[1])):
        return "it drops activations"
    return None


def norms(block: Any) -> tuple[Any, ...]:
    """The RMSNorms of a block's attentions."""
    one, two = block.attn1, block.attn2
    found = (one.norm_q, one.norm_k, two.norm_q, two.norm_k)
    return found if two.add_k_proj is None else (*found, two.norm_added_k)


def _forward(module: nn.Module) -> Any:
    """The forward of a module's class: a subclass's, or one that was put there."""
    return original_class(module).forward


def _library(made: Any) -> str:
    name: str = made.__module__
    return name.partition(".")[0]
