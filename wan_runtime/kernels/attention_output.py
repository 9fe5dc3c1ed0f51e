"""What attention gave, plus v's bias, quantised a token for the output projection: one pass.

The rows of an attention sum to one, so v's bias can be added after it, in fp32. With image context (I2V) the text's
and the image's attention are summed here too.

In:  x [tokens, width], contiguous; bias [width] fp32 or None; other [tokens, width] or None, contiguous.
Out: Rows of x + other + bias: e4m3 codes and scale [tokens, 1], or plain in x's dtype.
Bytes moved: 3 an element from bf16 to codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import E4M3_MAX, LEAST, Rows, empty_rows, shape_of, store_row, written


def attention_output_torch(
    x: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, codes: bool
) -> Rows:
    """The plain-torch twin."""
    values = x.float() if other is None else x.float() + other.float()
    return written(values if bias is None else values + bias, codes, x.dtype)


@triton.jit
def _attention_output(
    x, bias, other, out, scales, tokens, width, HAS_BIAS: tl.constexpr, HAS_OTHER: tl.constexpr,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0)
    for row in range(first, last):
        at = row * width + columns
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_OTHER:
            values += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += b
        store_row(values, out, scales, row, columns, inside, width, E4M3_MAX, LEAST, CODES)


def attention_output(
    x: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, codes: bool, rows: int = 1
) -> Rows:
    """x + other + bias of x [tokens, width], quantised a row; see the module's docstring."""
    tokens, width = x.shape
    result = empty_rows(x, codes, x.dtype)
    if tokens:
        _attention_output[(triton.cdiv(tokens, rows),)](
            x, bias, other, result.values, result.scale, tokens, width, HAS_BIAS=bias is not None,
            HAS_OTHER=other is not None, E4M3_MAX=E4M3_MAX, LEAST=LEAST, CODES=codes, ROWS=rows, **shape_of(width),
        )  # fmt: skip
    return result
