"""MXFP4: 4-bit E2M1 codes in blocks of 32 along `in`, a power of two a block.

slot         dtype   shape           meaning
payload      uint8   [out, in / 2]   two codes a byte; the EVEN element in the LOW nibble
block_scale  uint8   [out, in / 32]  the e8m0 bytes, plain row-major (not swizzled): W = E2M1[code] * 2^(byte - 127);
                                     255 is NaN

E2M1 magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6 for the codes 0 to 7; bit 3 is the sign.
Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import torch

from wan_runtime.formats import Format, Slots, _mx
from wan_runtime.formats._e2m1 import E2M1_MAX, pack, round_to_e2m1, unpack


def quantize(weight: torch.Tensor, per_channel: bool) -> dict[str, torch.Tensor]:
    quotient, block_scale = _mx.scaled(weight, E2M1_MAX)
    return {"payload": pack(round_to_e2m1(quotient)), "block_scale": block_scale}


def dequantize(slots: Slots) -> torch.Tensor:
    return _mx.times(unpack(slots["payload"]), slots["block_scale"])


FORMAT = Format(
    name="mxfp4",
    layout=lambda out, inp: _mx.layout(out, inp, 4),
    refuses=_mx.refuses,
    quantize=quantize,
    dequantize=dequantize,
    check=_mx.check,
    bits=4.25,
)
