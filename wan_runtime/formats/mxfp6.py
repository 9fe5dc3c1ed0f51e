"""MXFP6 (E3M2): 6-bit codes in blocks of 32 along `in`, a power of two a block.

slot         dtype   shape               meaning
payload      uint8   [out, 3 * in / 4]   four codes a, b, c, d in three bytes, least significant bit first:
                                         [b1 b0 a5..a0], [c3..c0 b5..b2], [d5..d0 c5 c4]
block_scale  uint8   [out, in / 32]      the e8m0 bytes, plain row-major (not swizzled); 255 is NaN
                                         W = E3M2[code] * 2^(byte - 127)

E3M2: bit 5 the sign, 3 exponent bits (bias 3), 2 mantissa bits; largest 28, smallest 1/16; every code is finite.
Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.2 and 5.4.1; for the packing
LightX2V, mxfp6_quant_kernels_sm120.cu.
"""

from __future__ import annotations

import functools

import torch

from wan_runtime.formats import Format, Slots, _mx

E3M2_MAX = 28.0
LOWEST = -2  # the exponent of the smallest normal code, and of the steps below it


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """Code -> value, fp32 [64]."""
    code = torch.arange(32, device=device)
    exponent, mantissa = (code >> 2), (code & 3)
    normal = (4 + mantissa) * 2.0 ** (exponent - 5)
    size = torch.where(exponent == 0, mantissa / 16, normal).float()
    return torch.cat((size, -size))


def round_to_e3m2(values: torch.Tensor) -> torch.Tensor:
    """fp32 values -> uint8 codes 0..63, round to nearest, ties to the even code, saturating at 28."""
    size = values.abs().clamp(max=E3M2_MAX)
    exponent = torch.frexp(size.clamp_min(2.0**LOWEST)).exponent - 1
    # Between two powers of two lie 4 codes, and below the first 4 more: the step's number, counted on, is the code.
    steps = torch.round(torch.ldexp(size, 2 - exponent)).to(torch.int32)
    code = steps + 4 * (exponent - LOWEST)
    return code.clamp(max=31).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 5)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] -> bytes [out, 3 * in / 4]."""
    a, b, c, d = codes.reshape(codes.shape[0], -1, 4).unbind(-1)
    # uint8 shifts drop what leaves the byte.
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), dim=-1).flatten(1)


def unpack(payload: torch.Tensor) -> torch.Tensor:
    """Bytes [out, 3 * in / 4] -> codes [out, in]."""
    first, second, third = payload.reshape(payload.shape[0], -1, 3).unbind(-1)
    b, c = (first >> 6) | (second << 2), (second >> 4) | (third << 4)
    return torch.stack((first & 63, b & 63, c & 63, third >> 2), dim=-1).flatten(1)


def quantize(weight: torch.Tensor, per_channel: bool) -> dict[str, torch.Tensor]:
    quotient, block_scale = _mx.scaled(weight, E3M2_MAX)
    return {"payload": pack(round_to_e3m2(quotient)), "block_scale": block_scale}


def dequantize(slots: Slots) -> torch.Tensor:
    payload = slots["payload"]
    codes = unpack(payload)
    values = _table(payload.device).index_select(0, codes.flatten().to(torch.int32))
    return _mx.times(values.reshape(codes.shape), slots["block_scale"])


FORMAT = Format(
    name="mxfp6",
    layout=lambda out, inp: _mx.layout(out, inp, 6),
    refuses=_mx.refuses,
    quantize=quantize,
    dequantize=dequantize,
    check=_mx.check,
    bits=6.25,
)
