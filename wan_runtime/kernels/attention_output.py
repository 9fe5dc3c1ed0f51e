"""What attention gave, plus v's bias, quantised for the output projection: one pass.

The rows of an attention sum to one, so v's bias can be added after it, in fp32. With image context (I2V) the text's
and the image's attention are summed here too.

In:  x [tokens, width], contiguous; bias [width] fp32 or None; other [tokens, width] or None, contiguous.
Out: Rows of x + other + bias in `codes`; plain ones in x's dtype.
Bytes moved, an element from bf16: 3 to FP8 codes, 3.03 to MXFP8, 6.56 to NVFP4, which takes a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import (
    E4M3_MAX,
    LEAST,
    Launch,
    Rows,
    finished,
    load_row,
    store_row,
    to_write,
    written,
)

LAUNCH = Launch(rows=8)


def attention_output_torch(
    x: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, codes: int
) -> Rows:
    """The plain-torch twin."""
    values = x.float() if other is None else x.float() + other.float()
    return written(values if bias is None else values + bias, codes, x.dtype)


@triton.jit
def _attention_output(
    x, bias, other, out, scales, tokens, rows, HAS_BIAS: tl.constexpr, HAS_OTHER: tl.constexpr,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    if HAS_BIAS:
        bias_a, bias_b = load_row(bias, WIDTH, A, B)
    for row in tl.range(first, last, num_stages=STAGES):
        a, b = load_row(x + row * WIDTH, WIDTH, A, B)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if HAS_OTHER:
            other_a, other_b = load_row(other + row * WIDTH, WIDTH, A, B)
            a += other_a.to(tl.float32)
            b += other_b.to(tl.float32)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
        store_row(a, b, out, scales, row, WIDTH, A, B, E4M3_MAX, LEAST, CODES)


def attention_output(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    codes: int,
    launch: Launch = LAUNCH,
) -> Rows:
    """x + other + bias of x [tokens, width], quantised a row; see above."""
    tokens, width = x.shape
    result = to_write(x, codes, x.dtype)
    if tokens:
        _attention_output[launch.grid(tokens)](
            x, bias, other, result.values, result.scale, tokens, launch.rows, HAS_BIAS=bias is not None,
            HAS_OTHER=other is not None, E4M3_MAX=E4M3_MAX, LEAST=LEAST, CODES=int(codes),
            **launch.constants(width, x.itemsize + (0 if other is None else other.itemsize)),
        )  # fmt: skip
    return finished(result, codes)
