"""NVFP4 weight -> FP8 weight with one scale an output channel, for GPUs that multiply FP8 and not FP4.

In:  payload [out, in / 2] uint8 (even element in the low nibble), block_scale [out, in / 16] uint8 (e4m3 bytes),
     scale [1, 1] fp32.
Out: codes [out, in] float8_e4m3fn, channel scale [out, 1] fp32.

The channel scale is the largest block scale of the row times 6 / 448: an upper bound of the row's amax, so nothing
saturates, and it needs the block scales alone. Codes then round once more to e4m3 (about 2 % relative error a weight,
well below NVFP4's own).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.formats import nvfp4
from wan_runtime.formats._e2m1 import E2M1_MAX

TOP = nvfp4.E4M3_MAX / E2M1_MAX


def expand_nvfp4_torch(
    payload: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain-torch twin."""
    largest = block_scale.view(torch.float8_e4m3fn).float().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    one = torch.ones(1, 1, device=payload.device)
    weight = nvfp4.dequantize({"payload": payload, "block_scale": block_scale, "scale": one})
    return (weight * (TOP / largest)).to(torch.float8_e4m3fn), largest * scale / TOP


@triton.jit
def _expand_row(
    payload, block_scale, scale, codes, channel_scale, half, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    inside = pairs < half
    packed = tl.load(payload + row * half + pairs, mask=inside, other=0)
    bits = tl.load(block_scale + row * (half // 8) + pairs // 8, mask=inside, other=0)
    scales = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    largest = tl.max(scales, 0)
    largest = tl.where(largest > 0, largest, 1.0)
    factor = scales * (TOP / largest)
    low = _e2m1(packed & 0xF) * factor
    high = _e2m1(packed >> 4) * factor
    both = tl.interleave(low, high).to(tl.float8e4nv)
    columns = tl.arange(0, 2 * BLOCK)
    tl.store(codes + row * (2 * half) + columns, both, mask=columns < 2 * half)
    tl.store(channel_scale + row, largest * tl.load(scale) / TOP)


@triton.jit
def _e2m1(code):
    magnitude = (code & 7).to(tl.int32)
    exponent = (magnitude >> 1) - 1
    normal = (1.0 + 0.5 * (magnitude & 1).to(tl.float32)) * tl.exp2(exponent.to(tl.float32))
    value = tl.where(magnitude < 2, 0.5 * magnitude.to(tl.float32), normal)
    return tl.where(code >= 8, -value, value)


def expand_nvfp4(
    payload: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand one NVFP4 weight to FP8 codes and channel scales; see the module's docstring."""
    out, half = payload.shape
    codes = torch.empty(out, 2 * half, dtype=torch.float8_e4m3fn, device=payload.device)
    channel_scale = torch.empty(out, 1, dtype=torch.float32, device=payload.device)
    block = triton.next_power_of_2(half)
    _expand_row[(out,)](
        payload,
        block_scale,
        scale,
        codes,
        channel_scale,
        half,
        TOP=TOP,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return codes, channel_scale
