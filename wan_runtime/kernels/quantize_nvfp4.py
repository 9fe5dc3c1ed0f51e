"""NVFP4 quantisation of activations, for GPUs that multiply FP4: one pass after the amax.

In:  x [tokens, width] bf16, fp16 or fp32, width a multiple of 16; static scale [1, 1] fp32 or None.
Out: Blocks: payload [tokens, width / 2] uint8 (even element in the low nibble), each row 0 up to a multiple of 16
     bytes, as cuBLAS wants rows of so many; block scales [tokens up to 128s, width / 16 up to 4s] uint8, the e4m3fn
     bytes in the 128 x 4 tile order; scale [1] fp32.
     x ~ E2M1[code] * block scale * scale, scale = amax of x / (6 * 448) unless it is given.

A block with NaN or infinity gets the block scale NaN. Bytes moved: 4.56 an element from bf16, 2 of them for the amax.
The rule is that of the weights (formats/nvfp4.py), and of comfy-kitchen's quantiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wan_runtime.dialects._swizzle import swizzle
from wan_runtime.formats import nvfp4
from wan_runtime.formats._e2m1 import E2M1_MAX
from wan_runtime.kernels._blocks import (
    BLOCKS,
    INFINITE,
    TOKENS,
    e4m3_code,
    e4m3_value,
    empty_scales,
    largest_bits,
    load_tile,
    store_scales,
    tile_grid,
)

ROW = 16  # bytes, of which a row of codes is a multiple
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Blocks:
    """Activations in blocks: see the module that made them. `scale` is NVFP4's second one; MXFP8 has none."""

    payload: torch.Tensor
    block_scale: torch.Tensor
    scale: torch.Tensor | None = None


def quantize_nvfp4_torch(x: torch.Tensor, static: torch.Tensor | None) -> Blocks:
    """The plain-torch twin."""
    amax = x.float().abs().amax()
    scale = nvfp4.scale_for(amax) if static is None else static
    slots = nvfp4.quantize_by(x, scale.reshape(1, 1))
    missing = -slots["payload"].shape[1] % ROW
    payload = torch.nn.functional.pad(slots["payload"], (0, missing))
    return Blocks(payload, swizzle(slots["block_scale"]), scale.reshape(1))


@triton.jit
def _quantize_nvfp4(
    x, amax, static, payload, scales, scale, tokens, width, half, GIVEN: tl.constexpr, TOP: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, INFINITE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    if GIVEN:
        whole = tl.load(static)
    else:
        largest = tl.load(amax)
        whole = tl.where(largest > 0, tl.maximum(tl.div_rn(largest, LARGEST), TINY), 1.0)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, whole)
    values = load_tile(x, tokens, width, TOKENS, BLOCKS, 16)
    bits = largest_bits(values, 2)
    wanted = tl.div_rn(tl.div_rn(bits.to(tl.float32, bitcast=True), TOP), whole)
    code = e4m3_code(tl.minimum(tl.maximum(wanted, 0.001953125), 448.0))
    step = (e4m3_value(code) * whole)[:, :, None]
    store_scales(scales, tl.where(bits < INFINITE, code, 0x7F), tokens, width // 16, TOKENS, BLOCKS)
    # A true division: thresholds times the step round to values that an activation can have. Halfway between two codes
    # the even one wins, so every second threshold belongs to the code below it.
    size = tl.div_rn(tl.abs(values), tl.broadcast_to(step, values.shape))
    element = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    element += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    element += (size > 5.0).to(tl.int32)
    element |= (values.to(tl.int32, bitcast=True) >> 28) & 8
    low, high = tl.split(tl.reshape(element, (TOKENS, BLOCKS * 8, 2)))
    rows = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) * (BLOCKS * 8) + tl.arange(0, BLOCKS * 8)
    inside = (rows < tokens)[:, None] & (columns < half)[None, :]
    tl.store(payload + rows[:, None] * half + columns[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)


def empty_blocks(like: torch.Tensor) -> Blocks:
    """Unwritten Blocks of x [tokens, width]."""
    tokens, width = like.shape
    half = triton.cdiv(width // 2, ROW) * ROW
    payload = torch.empty(tokens, half, dtype=torch.uint8, device=like.device)
    scales = empty_scales(tokens, width // nvfp4.BLOCK, torch.uint8, like.device)
    return Blocks(payload, scales, torch.empty(1, dtype=torch.float32, device=like.device))


def quantize_nvfp4(x: torch.Tensor, static: torch.Tensor | None, amax: torch.Tensor | None = None) -> Blocks:
    """Quantise x [tokens, width] to NVFP4; see the module's docstring.

    `amax` is the largest magnitude of x, fp32 with one element, where whoever made x knows it: that saves a pass.
    """
    x = x.contiguous()
    tokens, width = x.shape
    blocks = empty_blocks(x)
    if static is None and amax is None:
        # The infinity norm is torch's one pass that gives the largest magnitude, and NaN where there is one.
        amax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    _quantize_nvfp4[tile_grid(tokens, width // nvfp4.BLOCK)](
        x, amax, static, blocks.payload, blocks.block_scale, blocks.scale, tokens, width, blocks.payload.shape[1],
        GIVEN=static is not None, TOP=E2M1_MAX, LARGEST=nvfp4.LARGEST, TINY=TINY, INFINITE=INFINITE, TOKENS=TOKENS,
        BLOCKS=BLOCKS, num_warps=4,
    )  # fmt: skip
    return blocks
