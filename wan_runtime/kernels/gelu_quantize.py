"""Bias, tanh-GELU and per-token FP8 quantisation of the feed-forward's hidden activations: one pass.

In:  x [tokens, width], a product without its bias, contiguous; bias [width] fp32 or None.
Out: Rows of gelu(x + bias): e4m3 codes and scale [tokens, 1], or plain in x's dtype.
Bytes moved: 3 an element from bf16 to codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import E4M3_MAX, LEAST, Rows, empty_rows, shape_of, store_row, written


def gelu_quantize_torch(x: torch.Tensor, bias: torch.Tensor | None, codes: bool) -> Rows:
    """The plain-torch twin."""
    values = x.float() if bias is None else x.float() + bias
    return written(torch.nn.functional.gelu(values, approximate="tanh"), codes, x.dtype)


@triton.jit
def _gelu_quantize(
    x, bias, out, scales, tokens, width, HAS_BIAS: tl.constexpr, E4M3_MAX: tl.constexpr, LEAST: tl.constexpr,
    CODES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0)
    for row in range(first, last):
        values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += b
        # gelu_tanh(x) = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3): one exponential, no tanh.
        twice = values * (1.5957691216057308 + 0.07135481627161354 * values * values)
        values = values / (1.0 + tl.exp(-twice))
        store_row(values, out, scales, row, columns, inside, width, E4M3_MAX, LEAST, CODES)


def gelu_quantize(x: torch.Tensor, bias: torch.Tensor | None, codes: bool, rows: int = 1) -> Rows:
    """gelu(x + bias) of x [tokens, width], quantised a row; see the module's docstring."""
    tokens, width = x.shape
    result = empty_rows(x, codes, x.dtype)
    if tokens:
        _gelu_quantize[(triton.cdiv(tokens, rows),)](
            x, bias, result.values, result.scale, tokens, width, HAS_BIAS=bias is not None, E4M3_MAX=E4M3_MAX,
            LEAST=LEAST, CODES=codes, ROWS=rows, **shape_of(width, 1024),
        )  # fmt: skip
    return result
