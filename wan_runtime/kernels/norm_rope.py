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

from wan_runtime.kernels._launch import Launch, launch_at
from wan_runtime.kernels._rows import E4M3_MAX, LEAST, load_rows, row_sum, store_plain
from wan_runtime.kernels._tiles import column

LAUNCHES = {1536: Launch(rows=8), 3072: Launch(rows=8, tile=4), 5120: Launch(rows=8)}


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
def _of_pairs(table, pair, R: tl.constexpr):
    """What R rows' tables have for these pairs: [R, 1, pairs]."""
    return tl.load(table + pair)[None, None, :] if R == 1 else tl.load(table + pair[None, :])[:, None, :]


@triton.jit
def _rotate(values, table, START: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr):
    """Turn COUNT values of R rows, the rows' from START on, by the angles of their pairs at `table`, a column: the
    same HALF for every head."""
    PERIOD: tl.constexpr = min(COUNT // 2, HALF)  # less than a head where the row is one head, in two parts
    even, odd = tl.split(tl.reshape(values, (R, COUNT // (2 * PERIOD), PERIOD, 2)))
    pair = (START // 2) % HALF + tl.arange(0, PERIOD)
    cos = _of_pairs(table, pair, R)
    sin = _of_pairs(table + HALF, pair, R)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (R, COUNT))


@triton.jit
def _norm_rope(
    x, out, bias, weight, table, tokens, rows, stride, out_stride, positions, eps,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATE: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    if HAS_BIAS:
        bias_a, bias_b = load_rows(bias, 0, 1, WIDTH, A, B, 1)
    weight_a, weight_b = load_rows(weight, 0, 1, WIDTH, A, B, 1)
    # In place too a row may be read ahead: no other program writes it.
    for row in tl.range(first, last, R, num_stages=STAGES):
        left = last - row
        a, b = load_rows(x + row * stride, stride, left, WIDTH, A, B, R)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
        scale = tl.rsqrt(row_sum(a * a, b * b, A, B, R) / WIDTH + eps)
        a = a * scale * weight_a
        b = b * scale * weight_b
        if ROTATE:
            angles = table + ((row + column(R)) % positions) * (2 * HALF)
            a = _rotate(a, angles, 0, A, HALF, R)
            b = _rotate(b, angles, A, B, HALF, R)
        store_plain(out + row * out_stride, out_stride, left, a, b, WIDTH, A, B, R)


def norm_rope(
    x: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, eps: float, table: torch.Tensor | None,
    out: torch.Tensor | None = None, launch: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Add the bias, normalise and rotate x [tokens, width], in place or into `out`, and return that; see above."""
    tokens, width = x.shape
    target = x if out is None else out
    if tokens:
        launch = launch or launch_at(LAUNCHES, width)
        _norm_rope[launch.grid(tokens)](
            x, target, bias, weight, table, tokens, launch.rows, x.stride(0), target.stride(0),
            1 if table is None else table.shape[0], eps, HALF=1 if table is None else table.shape[1] // 2,
            HAS_BIAS=bias is not None, ROTATE=table is not None, **launch.constants(width, x.itemsize),
        )  # fmt: skip
    return target
