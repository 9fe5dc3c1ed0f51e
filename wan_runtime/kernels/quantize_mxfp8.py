"""MXFP8 quantisation of activations, for GPUs that multiply MX blocks: one pass.

In:  x [tokens, width] bf16, fp16 or fp32, width a multiple of 32.
Out: Blocks: payload [tokens, width] float8_e4m3fn; block scales [tokens up to 128s, width / 32 up to 4s] uint8, the
     e8m0 bytes in the 128 x 4 tile order; x ~ code * 2^(byte - 127).

The scale is the smallest power of two that saturates nothing; a block of zeros gets byte 0, one with NaN or infinity
byte 255 (NaN). Bytes moved: 3.03 an element from bf16. The rule is that of the weights (formats/_mx.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.dialects._swizzle import swizzle
from wan_runtime.formats import _mx, mxfp8
from wan_runtime.kernels._blocks import (
    BLOCKS,
    INFINITE,
    TOKENS,
    e8m0_byte,
    e8m0_inverse,
    empty_scales,
    largest_bits,
    load_tile,
    store_scales,
    tile_grid,
)
from wan_runtime.kernels.quantize_nvfp4 import Blocks


def quantize_mxfp8_torch(x: torch.Tensor) -> Blocks:
    """The plain-torch twin."""
    slots = mxfp8.quantize(x, True)
    return Blocks(slots["payload"].view(torch.float8_e4m3fn), swizzle(slots["block_scale"]))


@triton.jit
def _quantize_mxfp8(
    x, payload, scales, tokens, width, INFINITE: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    values = load_tile(x, tokens, width, TOKENS, BLOCKS, BLOCK)
    bits = largest_bits(values, 2)
    byte = e8m0_byte(bits)
    store_scales(scales, tl.where(bits < INFINITE, byte, 255), tokens, width // BLOCK, TOKENS, BLOCKS)
    codes = tl.reshape(values * e8m0_inverse(byte)[:, :, None], (TOKENS, BLOCKS * BLOCK))
    rows = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS * BLOCK)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    tl.store(
        payload + rows[:, None] * width + columns[None, :], codes.to(payload.dtype.element_ty), mask=inside
    )


def quantize_mxfp8(x: torch.Tensor) -> Blocks:
    """Quantise x [tokens, width] to MXFP8; see the module's docstring."""
    x = x.contiguous()
    tokens, width = x.shape
    payload = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_scales(tokens, width // _mx.BLOCK, torch.uint8, x.device)
    _quantize_mxfp8[tile_grid(tokens, width // _mx.BLOCK)](
        x, payload, scales, tokens, width, INFINITE=INFINITE, TOKENS=TOKENS, BLOCKS=BLOCKS, BLOCK=_mx.BLOCK,
        num_warps=8,
    )  # fmt: skip
    return Blocks(payload, scales)
