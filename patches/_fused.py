"""The forward of a WAN block on fused kernels, for any host that can name the block's parts.

The residual stream stays in the compute dtype. Between two products nothing passes over the activations more than
once: each kernel reads what a product gave, adds that product's fp32 bias, and writes what the next product reads, in
the codes that it takes (wan_runtime.kernels._codes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wan_runtime.attention import Attend
from wan_runtime.kernels._codes import OF_COMPUTE, Codes
from wan_runtime.linear import QuantLinear

from ._hooks import hooked
from ._stream import Begun, Following, Stream, add, end, multiply, settled


@dataclass(frozen=True)
class Coded:
    """Attention on e4m3 codes, and what norm_rope.bounded makes of norm_q's and norm_k's weights for it."""

    attend: Callable[..., torch.Tensor]
    q: tuple[torch.Tensor, torch.Tensor]
    k: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SelfAttention:
    """q, k, v and o are linears, norm_q and norm_k RMSNorms over the whole width; `coded` is set for FP8 attention."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    heads: int
    attend: Attend
    coded: Coded | None = None


@dataclass(frozen=True)
class CrossAttention:
    """As SelfAttention, on text; and on an image too where `image` holds (k, v, norm_k)."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module
    heads: int
    attend: Attend
    image: tuple[nn.Module, nn.Module, nn.Module] | None


@dataclass(frozen=True)
class Block:
    """A block's parts. `norm2` is the affine LayerNorm before cross-attention, or None where the host has none."""

    self_attention: SelfAttention
    cross_attention: CrossAttention
    norm2: nn.LayerNorm | None
    up: nn.Module
    down: nn.Module
    eps1: float
    eps3: float


@dataclass(frozen=True)
class Context:
    """What the blocks attend to: text, and image tokens ahead of it or None. Both [batch, tokens, width]."""

    text: torch.Tensor
    image: torch.Tensor | None


KeysValues = tuple[torch.Tensor, torch.Tensor]  # both [batch, tokens, heads, head]


def takes_codes(module: nn.Module) -> Codes:
    """How a linear takes its input: in codes where it is quantised, planned for codes, and touched by nobody since."""
    if (
        type(module) is QuantLinear
        and not module.static
        and not module.corrected
        and not module.pair
        and (payload := module._parameters["payload"]) is not None
        and module.planned_for == payload.device.type
        and module.coded is not None
        and hooked(module) is None
    ):
        return OF_COMPUTE[module.compute]
    return Codes.PLAIN


def common_codes(*modules: nn.Module) -> Codes:
    """How several linears take the input that they share: as all of them do, or plain."""
    first, *others = (takes_codes(module) for module in modules)
    return first if all(other == first for other in others) else Codes.PLAIN


def keys_and_values(
    k: nn.Module, v: nn.Module, norm_k: nn.Module, heads: int, tokens: torch.Tensor, kernels: Any
) -> KeysValues:
    """K (normalised) and V of context tokens [batch, tokens, width], with their biases."""
    batch, count, width = tokens.shape
    plain = tokens.reshape(batch * count, width)
    rows = kernels.attention_output(plain, None, None, common_codes(k, v))
    key, bias = multiply(k, rows)
    key = kernels.norm_rope(key, bias, weight_of(norm_k), eps_of(norm_k), None)
    value, bias = multiply(v, rows)
    value = value if bias is None else value.add_(bias)
    shape = (batch, count, heads, key.shape[-1] // heads)  # of no tokens -1 would say nothing
    return key.view(shape), value.view(shape)


def weight_of(norm: nn.Module) -> torch.Tensor:
    """A norm's weight in fp32."""
    weight: Any = norm.weight
    fp32: torch.Tensor = weight.detach().float()
    return fp32


def eps_of(norm: nn.Module) -> float:
    """A norm's epsilon; torch's RMSNorm means the dtype's own by None."""
    eps: float | None = norm.eps  # type: ignore[assignment]
    return torch.finfo(torch.float32).eps if eps is None else eps


def forward(
    block: Block,
    x: torch.Tensor,
    modulation: torch.Tensor,
    index: torch.Tensor | None,
    table: torch.Tensor | None,
    context: list[KeysValues],
    kernels: Any,
    *,
    begun: Begun | None = None,
    following: Following | None = None,
) -> tuple[torch.Tensor, Begun | None]:
    """One block.

    Args:
        x: the residual stream [batch, tokens, width]; left as it is.
        modulation: [entries, 6, width] fp32: shift, scale and gate of attention, then of the feed-forward.
        index: which entry each of the batch * tokens rows takes, int32, or None where all take the first.
        table: rotary table [tokens, head] of norm_rope, or None.
        context: K and V of the text, then of the image where there is one.
        kernels: wan_runtime.kernels.fused.TRITON, or TWINS.
        begun: what the block before has made of x for this one.
        following: the first norm of the block after this one, to be made in the pass that ends this block.

    Returns the stream after the block, a new tensor, and what the block after it begins with (None without
    `following`).
    """
    from wan_runtime.kernels.norm_modulate import Modulation

    batch, tokens, width = x.shape
    me, cross = block.self_attention, block.cross_attention
    stream = Stream(x.reshape(batch * tokens, width).contiguous())  # the kernels know no strides
    shift, scale, gate, shift3, scale3, gate3 = modulation.unbind(1)

    if begun is None:
        norm1 = Modulation(scale, shift, block.eps1, index=index)
        rows = kernels.norm_modulate(stream.values, norm1, coded_input(me))
    else:
        rows, stream = begun.rows, begun.stream or stream
    attended, v_bias = _self_attention(me, rows, batch, tokens, table, kernels)
    rows = kernels.attention_output(attended, v_bias, None, takes_codes(me.o))

    norm2 = None if block.norm2 is None else _affine(block.norm2)
    codes = Codes.PLAIN if norm2 is None else takes_codes(cross.q)
    stream, rows = add(stream, me.o, rows, gate, index, norm2, codes, kernels)
    if norm2 is None:
        stream = settled(stream, kernels)
        rows = _plain(stream.values)
    rows = _cross_attention(cross, rows, batch, tokens, context, kernels)

    norm3 = Modulation(scale3, shift3, block.eps3, index=index)
    stream, rows = add(stream, cross.o, rows, None, index, norm3, takes_codes(block.up), kernels)
    hidden, bias = multiply(block.up, rows)
    rows = kernels.gelu_quantize(hidden, bias, takes_codes(block.down))
    del hidden
    total, next_begun = end(stream, block.down, rows, gate3, index, following, kernels)
    return total.view(batch, tokens, width), next_begun


def coded_input(part: SelfAttention) -> Codes:
    """How q, k and v take their input, so that it is quantised once."""
    return common_codes(part.q, part.k, part.v)


def _self_attention(
    part: SelfAttention, rows: Any, batch: int, tokens: int, table: torch.Tensor | None, kernels: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What self-attention gives [batch * tokens, width], and v's bias where it is still to be added."""
    q, q_bias = multiply(part.q, rows)
    k, k_bias = multiply(part.k, rows)
    v, v_bias = multiply(part.v, rows)
    if part.coded is not None:
        q, k = (
            _codes(y, bias, folded[0], eps_of(norm), table, kernels)
            for y, bias, folded, norm in (
                (q, q_bias, part.coded.q, part.norm_q), (k, k_bias, part.coded.k, part.norm_k),
            )
        )  # fmt: skip
        shape = (batch, tokens, part.heads, -1)
        v, v_scale = kernels.quantize_heads(v.view(shape))
        scales = (folded[1].expand(batch, -1).contiguous() for folded in (part.coded.q, part.coded.k))
        return part.coded.attend(q.view(shape), k.view(shape), v, *scales, v_scale).reshape(
            batch * tokens, -1
        ), v_bias
    q = kernels.norm_rope(q, q_bias, weight_of(part.norm_q), eps_of(part.norm_q), table)
    k = kernels.norm_rope(k, k_bias, weight_of(part.norm_k), eps_of(part.norm_k), table)
    # A coded product is bf16 whatever the host's dtype, and one of the three may not be coded.
    q, k, v = (t.to(q.dtype).view(batch, tokens, part.heads, -1) for t in (q, k, v))
    return part.attend(q, k, v).reshape(batch * tokens, -1), v_bias


def _codes(
    y: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, eps: float, table: torch.Tensor | None,
    kernels: Any,
) -> torch.Tensor:  # fmt: skip
    """q or k normalised and rotated to e4m3 codes, with the weight that holds their scale."""
    out = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
    codes: torch.Tensor = kernels.norm_rope(y, bias, weight, eps, table, out=out)
    return codes


def _cross_attention(
    part: CrossAttention, rows: Any, batch: int, tokens: int, context: list[KeysValues], kernels: Any
) -> Any:
    """What cross-attention gives, as Rows for its output projection."""
    q, q_bias = multiply(part.q, rows)
    q = kernels.norm_rope(q, q_bias, weight_of(part.norm_q), eps_of(part.norm_q), None)
    q = q.view(batch, tokens, part.heads, -1)
    attended = [
        part.attend(q, key.to(q.dtype), value.to(q.dtype)).reshape(batch * tokens, -1)
        for key, value in context
    ]
    other = attended[1] if len(attended) > 1 else None
    return kernels.attention_output(attended[0], None, other, takes_codes(part.o))


def _affine(norm: nn.LayerNorm) -> Any:
    from wan_runtime.kernels.norm_modulate import Modulation

    return Modulation(norm.weight.float()[None], norm.bias.float()[None], norm.eps, plus=0.0)


def _plain(values: torch.Tensor) -> Any:
    from wan_runtime.kernels._rows import Rows

    return Rows(values)
