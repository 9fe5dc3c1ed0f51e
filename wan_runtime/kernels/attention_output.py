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

from wan_runtime.kernels._launch import Launch, launch_at
from wan_runtime.kernels._rows import (
    E4M3_MAX,
    LEAST,
    Rows,
    finished,
    load_rows,
    store_rows,
    to_write,
    written,
)

LAUNCHES = {1536: Launch(rows=8), 3072: Launch(rows=8, warps=8, tile=4), 5120: Launch(rows=8)}


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
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    if HAS_BIAS:
        bias_a, bias_b = load_rows(bias, 0, 1, WIDTH, A, B, 1)
    for row in tl.range(first, last, R, num_stages=STAGES):
        left = last - row
        a, b = load_rows(x + row * WIDTH, WIDTH, left, WIDTH, A, B, R)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if HAS_OTHER:
            other_a, other_b = load_rows(other + row * WIDTH, WIDTH, left, WIDTH, A, B, R)
            a += other_a.to(tl.float32)
            b += other_b.to(tl.float32)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
        store_rows(a, b, out, scales, row, left, E4M3_MAX, LEAST, CODES, WIDTH, A, B, R)


def attention_output(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    codes: int,
    launch: Launch | None = None,
) -> Rows:
    """x + other + bias of x [tokens, width], quantised a row; see above."""
    tokens, width = x.shape
    result = to_write(x, codes, x.dtype)
    if tokens:
        launch = launch or launch_at(LAUNCHES, width)
        _attention_output[launch.grid(tokens)](
            x, bias, other, result.values, result.scale, tokens, launch.rows, HAS_BIAS=bias is not None,
            HAS_OTHER=other is not None, E4M3_MAX=E4M3_MAX, LEAST=LEAST, CODES=int(codes),
            **launch.constants(width, x.itemsize + (0 if other is None else other.itemsize)),
        )  # fmt: skip
    return finished(result, codes)
