"""What the block quantisers share: block scales in the 128 x 4 tile order that cuBLAS reads, and E4M3 by its bits.

A program of theirs takes one tile: 128 tokens and the values of 4 blocks. It writes the tile's 512 bytes of scales
whole, 0 where there is no token or no block, so nothing needs to be cleared before. A program of a row kernel has whole
tokens instead, and writes each one's bytes where they belong in the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.dialects._swizzle import padded
from wan_runtime.kernels._tiles import column, inside

TOKENS = 128  # of a tile of scales
BLOCKS = 4
INFINITE = 0x7F800000  # the bits of infinity in fp32: those of NaN are above, those of any number below


def tile_grid(tokens: int, blocks: int) -> tuple[int, int]:
    """One program a tile, those of the same tokens side by side, as their values are in memory."""
    return triton.cdiv(blocks, BLOCKS), triton.cdiv(tokens, TOKENS)


def empty_scales(tokens: int, blocks: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Unwritten block scales in tile order [padded tokens, padded blocks]."""
    return torch.empty(padded(tokens, blocks), dtype=dtype, device=device)


@triton.jit
def load_tile(x, tokens, width, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's values in fp32 [TOKENS, BLOCKS, BLOCK], 0 outside."""
    rows = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS * BLOCK)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    values = tl.load(x + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
    return tl.reshape(values.to(tl.float32), (TOKENS, BLOCKS, BLOCK))


@triton.jit
def largest_bits(values, AXIS: tl.constexpr):
    """The largest magnitude of each block as its bits, among which NaN is above infinity and is not lost."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)


@triton.jit
def e8m0_byte(bits):
    """The bits of a block's largest magnitude -> the least power of two that saturates nothing, as its byte."""
    # 448 is 1.75 * 2^8: a power of two more where the largest magnitude's fraction is above 1.75.
    return tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 0)


@triton.jit
def e8m0_inverse(byte):
    """What values are multiplied by to be of that scale."""
    return ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mxfp8_part(
    values, scales, row, left, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr
):
    """SIZE fp32 values of R tokens, from number FIRST on -> what rounds to their codes. Writes their scales.

    FIRST and SIZE are multiples of 32; what lies past WIDTH is 0 and has no scale.
    """
    tl.static_assert(SIZE % 32 == 0, "a part of a row holds whole blocks")
    blocks = tl.reshape(values, (R, SIZE // 32, 32))
    bits = largest_bits(blocks, 2)
    byte = e8m0_byte(bits)
    block = FIRST // 32 + tl.arange(0, SIZE // 32)
    rows = row + column(R)
    tile = rows // 128 * ((WIDTH // 32 + 3) // 4) + (block // 4)[None, :]
    at = tile * 512 + rows % 32 * 16 + rows % 128 // 32 * 4 + (block % 4)[None, :]
    present = inside(left, block, FIRST + SIZE <= WIDTH, WIDTH // 32, R)
    tl.store(scales + at, tl.where(bits < 0x7F800000, byte, 255).to(tl.uint8), mask=present)
    return tl.reshape(blocks * e8m0_inverse(byte)[:, :, None], (R, SIZE))


@triton.jit
def store_scales(scales, codes, tokens, blocks, TOKENS: tl.constexpr, BLOCKS: tl.constexpr):
    """Write the codes [TOKENS, BLOCKS] of this program's tile in tile order, 0 outside."""
    row = tl.arange(0, TOKENS)
    block = tl.arange(0, BLOCKS)
    inside = (tl.program_id(1) * TOKENS + row < tokens)[:, None]
    inside = inside & (tl.program_id(0) * BLOCKS + block < blocks)[None, :]
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = (row % 32 * 16 + row // 32 * 4)[:, None] + block[None, :]
    tl.store(scales + tile * (TOKENS * BLOCKS) + at, tl.where(inside, codes, 0).to(tl.uint8))


@triton.jit
def e4m3_code(value):
    """fp32 from 2^-9 to 448 -> its E4M3 byte, ties to even; by integers, as the interpreter's own cast is inexact."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # the exponents' biases are 127 and 7
    # Next to 2^14 a step of fp32 is 2^-9, the step of E4M3 below 2^-6: the sum rounds to it.
    below = (value + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(value < 0.015625, below, normal)


@triton.jit
def e4m3_value(code):
    """A positive E4M3 byte -> fp32."""
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
