"""E2M1, the 4-bit floating-point code of NVFP4 and MXFP4: its values, rounding and packing.

Magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6 for the codes 0 to 7; bit 3 is the sign. Two codes a byte, the EVEN element in
the LOW nibble.
"""

from __future__ import annotations

import functools

import torch

E2M1_MAX = 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """Byte -> its two values, fp32 [256, 2]: the low nibble's first."""
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 0xF], values[byte >> 4]), dim=1)


def round_to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """fp32 values -> uint8 codes 0..15, round to nearest, ties to the even code, saturating at 6."""
    # The spacing is 0.5 below 2, 1 below 4 and 2 above, and an even multiple of it is an even code.
    size = values.abs()
    low, middle, high = torch.round(size * 2), torch.round(size) + 2, torch.round(size / 2) + 4
    code = torch.where(size < 2, low, torch.where(size < 4, middle, high)).clamp_(max=7).to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] -> bytes [out, in / 2], even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(payload: torch.Tensor) -> torch.Tensor:
    """Bytes [out, in / 2] -> fp32 values [out, in]."""
    # One look-up gives both values of a byte, so the index takes 2 bytes a weight instead of 8.
    values = _pairs(payload.device).index_select(0, payload.flatten().to(torch.int32))
    return values.reshape(payload.shape[0], payload.shape[1] * 2)
