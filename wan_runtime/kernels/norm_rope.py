"""Bias, RMSNorm across all heads and rotary embedding of q or k, in place: one pass.

In:  x [tokens, width], a product without its bias, rows at any stride; bias [width] fp32 or None; weight [width] fp32;
     table [positions, head] fp32: cosines of the head / 2 pairs, then their sines; None for no rotation. Token t is at
     position t mod positions.
Out: x = rotate(RMSNorm(x + bias) * weight), in x's dtype; or the same written to `out` [tokens, width], contiguous,
     in its dtype: e4m3 codes for FP8 attention, with the scale folded into the weight (see `bounded`).

WAN normalises over the whole width, not a head at a time, and rotates neighbouring pairs (2 j, 2 j + 1).
Bytes moved: 4 an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import E4M3_MAX, LEAST, shape_of


def bounded(weight: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight [width] -> (the weight over its head's e4m3 scale, the scales [heads] fp32).

    RMSNorm leaves no value above sqrt(width), and a rotation no pair above its own length: sqrt(width) times the head's
    largest weight bounds the result, so a static scale needs no pass over the tokens. It is far above the usual amax,
    which costs a floating-point code nothing: only values under 2**-15 of the bound lose precision.
    """
    largest = weight.float().abs().view(heads, -1).amax(1)
    scale = (largest * weight.numel() ** 0.5 / E4M3_MAX).clamp_min(LEAST)
    return (weight.float().view(heads, -1) / scale[:, None]).flatten(), scale


def norm_rope_torch(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, eps: float, table: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The plain-torch twin."""
    values = x.float() if bias is None else x.float() + bias
    values = values * torch.rsqrt(values.square().mean(1, keepdim=True) + eps) * weight
    if table is not None:
        half = table.shape[1] // 2
        pairs = values.reshape(-1, table.shape[0], values.shape[1] // (2 * half), half, 2)
        cos, sin = table[None, :, None, :half], table[None, :, None, half:]
        even, odd = pairs.unbind(-1)
        values = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return (x if out is None else out).copy_(values.reshape(x.shape))


@triton.jit
def _norm_rope(
    x, out, bias, weight, table, tokens, width, stride, out_stride, positions, eps,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0)
    w = tl.load(weight + columns, mask=inside, other=0.0)
    for row in range(first, last):
        values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += b
        values = values * tl.rsqrt(tl.sum(values * values, 0) / width + eps) * w
        if ROTATE:
            even, odd = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
            pair = tl.arange(0, BLOCK // 2) % HALF
            at = table + (row % positions) * (2 * HALF) + pair
            cos = tl.load(at)
            sin = tl.load(at + HALF)
            values = tl.interleave(even * cos - odd * sin, even * sin + odd * cos)
        tl.store(out + row * out_stride + columns, values.to(out.dtype.element_ty), mask=inside)


def norm_rope(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, eps: float, table: torch.Tensor | None,
    out: torch.Tensor | None = None, rows: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Add the bias, normalise and rotate x [tokens, width], in place or into `out`, and return that; see above."""
    tokens, width = x.shape
    target = x if out is None else out
    if tokens:
        _norm_rope[(triton.cdiv(tokens, rows),)](
            x, target, bias, weight, table, tokens, width, x.stride(0), target.stride(0),
            1 if table is None else table.shape[0], eps,
            HALF=1 if table is None else table.shape[1] // 2, HAS_BIAS=bias is not None, ROTATE=table is not None,
            ROWS=rows, **shape_of(width),
        )  # fmt: skip
    return target
