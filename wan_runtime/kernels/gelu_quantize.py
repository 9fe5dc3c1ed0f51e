"""Bias, tanh-GELU and per-token FP8 quantisation of the feed-forward's hidden activations: one pass.

In:  x [tokens, width], a product without its bias, contiguous; bias [width] fp32 or None.
Out: Rows of gelu(x + bias): e4m3 codes and scale [tokens, 1], or plain in x's dtype.
Bytes moved: 3 an element from bf16 to codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import E4M3_MAX, LEAST, Rows, empty_rows, launch, load_row, store_row, written


def gelu_quantize_torch(x: torch.Tensor, bias: torch.Tensor | None, codes: bool) -> Rows:
    """The plain-torch twin."""
    values = x.float() if bias is None else x.float() + bias
    return written(torch.nn.functional.gelu(values, approximate="tanh"), codes, x.dtype)


@triton.jit
def _gelu(x):
    """x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3): no tanh, and no division, which takes five instructions
    where a reciprocal square root takes one."""
    root = tl.rsqrt(1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))
    return x * root * root


@triton.jit
def _gelu_quantize(
    x, bias, out, scales, tokens, rows, HAS_BIAS: tl.constexpr, E4M3_MAX: tl.constexpr, LEAST: tl.constexpr,
    CODES: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    if HAS_BIAS:
        bias_a, bias_b = load_row(bias, WIDTH, A, B)
    next_a, next_b = load_row(x + first * WIDTH, WIDTH, A, B)
    for row in range(first, last):
        a = next_a.to(tl.float32)
        b = next_b.to(tl.float32)
        next_a, next_b = load_row(x + tl.minimum(row + 1, last - 1) * WIDTH, WIDTH, A, B)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
        store_row(_gelu(a), _gelu(b), out, scales, row, WIDTH, A, B, E4M3_MAX, LEAST, CODES)


def gelu_quantize(
    x: torch.Tensor, bias: torch.Tensor | None, codes: bool, rows: int = 16, warps: int = 16
) -> Rows:
    """gelu(x + bias) of x [tokens, width], quantised a row; see above. `rows` and `warps` shape the launch."""
    tokens, width = x.shape
    result = empty_rows(x, codes, x.dtype)
    if tokens:
        grid, constants = launch(tokens, width, rows, warps)
        _gelu_quantize[grid](
            x, bias, result.values, result.scale, tokens, rows, HAS_BIAS=bias is not None, E4M3_MAX=E4M3_MAX,
            LEAST=LEAST, CODES=codes, **constants,
        )  # fmt: skip
    return result
