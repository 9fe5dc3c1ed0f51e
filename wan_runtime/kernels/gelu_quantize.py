"""Bias, tanh-GELU and quantisation of the feed-forward's hidden activations for the next product: one pass.

In:  x [tokens, width], a product without its bias, contiguous, width even and at least 4; bias [width] fp32 or None.
Out: Rows of gelu(x + bias) in `codes`; plain ones in x's dtype.
Bytes moved, an element from bf16: 3 to FP8 codes, 3.03 to MXFP8, 6.56 to NVFP4, which takes a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._blocks import largest_bits, mxfp8_part
from wan_runtime.kernels._rows import (
    E4M3_MAX,
    LEAST,
    Launch,
    Rows,
    finished,
    to_write,
    written,
)

LAUNCH = Launch(warps=16, stages=1, registers=64)  # waits for its arithmetic more than for memory


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
def _largest(values, C: tl.constexpr, COUNT: tl.constexpr):
    """COUNT values folded to the largest magnitudes of C groups."""
    return tl.max(tl.reshape(tl.abs(values), (C, COUNT // C)), 1)


@triton.jit
def _stored_bits(values, out, C: tl.constexpr, COUNT: tl.constexpr):
    """COUNT values as they will be stored, folded to the bits of the largest magnitudes of C groups."""
    rounded = values.to(out.dtype.element_ty).to(tl.float32)
    return largest_bits(tl.reshape(rounded, (C, COUNT // C)), 1)


@triton.jit
def _gelu_quantize(
    x, bias, out, scales, tokens, rows, HAS_BIAS: tl.constexpr, E4M3_MAX: tl.constexpr, LEAST: tl.constexpr,
    CODES: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    at_a = tl.arange(0, A)
    at_b = A + tl.arange(0, B)
    at_c = A + B + tl.arange(0, C)
    inside = at_c < WIDTH
    if HAS_BIAS:
        bias_a = tl.load(bias + at_a)
        bias_b = tl.load(bias + at_b)
        bias_c = tl.load(bias + at_c, mask=inside, other=0.0)
    for row in tl.range(first, last, num_stages=STAGES):
        read = x + row * WIDTH
        a = tl.load(read + at_a).to(tl.float32)
        b = tl.load(read + at_b).to(tl.float32)
        c = tl.load(read + at_c, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
            c += bias_c
        a = _gelu(a)
        b = _gelu(b)
        c = _gelu(c)
        if CODES == 1:
            folded = tl.maximum(_largest(a, C, A), _largest(b, C, B))
            amax = tl.max(tl.maximum(folded, tl.abs(c)), 0)
            scale = tl.where(amax > 0, tl.maximum(amax / E4M3_MAX, LEAST), 1.0)
            tl.store(scales + row, scale)
            inverse = 1.0 / scale
            a *= inverse
            b *= inverse
            c *= inverse
        elif CODES == 2:
            a = mxfp8_part(a, scales, row, 0, A, WIDTH)
            b = mxfp8_part(b, scales, row, A, B, WIDTH)
            c = mxfp8_part(c, scales, row, A + B, C, WIDTH)
        elif CODES == 3:
            bits = tl.maximum(_stored_bits(a, out, C, A), _stored_bits(b, out, C, B))
            largest = tl.max(tl.maximum(bits, _stored_bits(c, out, C, C)), 0)
            tl.store(scales + row, largest.to(tl.float32, bitcast=True))
        write = out + row * WIDTH
        tl.store(write + at_a, a.to(out.dtype.element_ty))
        tl.store(write + at_b, b.to(out.dtype.element_ty))
        tl.store(write + at_c, c.to(out.dtype.element_ty), mask=inside)


def gelu_quantize(x: torch.Tensor, bias: torch.Tensor | None, codes: int, launch: Launch = LAUNCH) -> Rows:
    """gelu(x + bias) of x [tokens, width], quantised a row; see above."""
    tokens, width = x.shape
    result = to_write(x, codes, x.dtype)
    if tokens:
        _gelu_quantize[launch.grid(tokens)](
            x, bias, result.values, result.scale, tokens, launch.rows, HAS_BIAS=bias is not None, E4M3_MAX=E4M3_MAX,
            LEAST=LEAST, CODES=int(codes), **launch.constants_of_three(width, x.itemsize),
        )  # fmt: skip
    return finished(result, codes)
