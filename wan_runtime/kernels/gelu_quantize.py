"""Bias, tanh-GELU and quantisation of the feed-forward's hidden activations for the next product: one pass.

In:  x [tokens, width], a product without its bias, contiguous, width even and at least 4; bias [width] fp32 or None.
Out: Rows of gelu(x + bias) in `codes`; plain ones in x's dtype.
Bytes moved, an element from bf16: 3 to FP8 codes, 3.03 to MXFP8, 6.56 to NVFP4, which takes a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._blocks import mxfp8_part
from wan_runtime.kernels._launch import Launch, launch_at
from wan_runtime.kernels._rows import (
    E4M3_MAX,
    LEAST,
    Rows,
    finished,
    folded,
    load_part,
    row_max,
    scale_rows,
    store_part,
    stored_bits,
    to_write,
    written,
)
from wan_runtime.kernels._tiles import store_column

LAUNCHES = {
    13824: Launch(rows=8, warps=16, stages=1, registers=64)
}  # waits for its arithmetic more than for memory


def gelu_quantize_torch(x: torch.Tensor, bias: torch.Tensor | None, codes: int) -> Rows:
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
    CODES: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    if HAS_BIAS:
        bias_a = load_part(bias, 0, 1, 0, A, WIDTH, 1)
        bias_b = load_part(bias, 0, 1, A, B, WIDTH, 1)
        bias_c = load_part(bias, 0, 1, A + B, C, WIDTH, 1)
    for row in tl.range(first, last, R, num_stages=STAGES):
        left = last - row
        read = x + row * WIDTH
        a = load_part(read, WIDTH, left, 0, A, WIDTH, R).to(tl.float32)
        b = load_part(read, WIDTH, left, A, B, WIDTH, R).to(tl.float32)
        c = load_part(read, WIDTH, left, A + B, C, WIDTH, R).to(tl.float32)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
            c += bias_c
        a = _gelu(a)
        b = _gelu(b)
        c = _gelu(c)
        if CODES == 1:
            largest = tl.maximum(folded(a, A, C, R), folded(b, B, C, R))
            amax = row_max(tl.maximum(largest, tl.abs(c)), R)
            inverse = scale_rows(scales + row, left, amax, E4M3_MAX, LEAST, R)
            a *= inverse
            b *= inverse
            c *= inverse
        elif CODES == 2:
            a = mxfp8_part(a, scales, row, left, 0, A, WIDTH, R)
            b = mxfp8_part(b, scales, row, left, A, B, WIDTH, R)
            c = mxfp8_part(c, scales, row, left, A + B, C, WIDTH, R)
        elif CODES == 3:
            bits = tl.maximum(stored_bits(a, out, A, C, R), stored_bits(b, out, B, C, R))
            bits = row_max(tl.maximum(bits, stored_bits(c, out, C, C, R)), R)
            store_column(scales + row, left, bits.to(tl.float32, bitcast=True), R)
        write = out + row * WIDTH
        store_part(write, WIDTH, left, a, 0, A, WIDTH, R)
        store_part(write, WIDTH, left, b, A, B, WIDTH, R)
        store_part(write, WIDTH, left, c, A + B, C, WIDTH, R)


def gelu_quantize(
    x: torch.Tensor, bias: torch.Tensor | None, codes: int, launch: Launch | None = None
) -> Rows:
    """gelu(x + bias) of x [tokens, width], quantised a row; see above."""
    tokens, width = x.shape
    result = to_write(x, codes, x.dtype)
    if tokens:
        launch = launch or launch_at(LAUNCHES, width)
        _gelu_quantize[launch.grid(tokens)](
            x, bias, result.values, result.scale, tokens, launch.rows, HAS_BIAS=bias is not None, E4M3_MAX=E4M3_MAX,
            LEAST=LEAST, CODES=int(codes), **launch.constants_of_three(width, x.itemsize),
        )  # fmt: skip
    return finished(result, codes)
