"""MXFP8: E4M3 codes in blocks of 32 along `in`, a power of two a block.

slot         dtype   shape           meaning
payload      uint8   [out, in]       the e4m3fn codes, row-major; largest 448, 0x7F and 0xFF are NaN
block_scale  uint8   [out, in / 32]  the e8m0 bytes, plain row-major (not swizzled): W = code * 2^(byte - 127);
                                     255 is NaN

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.1 and 5.4.1.
"""

from __future__ import annotations

import torch

from wan_runtime.doubts import Refuse, at_once
from wan_runtime.formats import Format, Slots, _mx, _scaled
from wan_runtime.formats._bytes import numbers


def quantize(weight: torch.Tensor, per_channel: bool) -> dict[str, torch.Tensor]:
    top = _scaled.E4M3.top
    quotient, block_scale = _mx.scaled(weight, top)
    codes = quotient.clamp(-top, top).to(torch.float8_e4m3fn)
    return {"payload": codes.view(torch.uint8), "block_scale": block_scale}


def dequantize(slots: Slots) -> torch.Tensor:
    return _mx.times(numbers(slots["payload"], torch.float8_e4m3fn), slots["block_scale"])


def check(slots: Slots, refuse: Refuse = at_once) -> None:
    _scaled.check_codes(slots["payload"], _scaled.E4M3, refuse)
    _mx.check(slots, refuse)


FORMAT = Format(
    name="mxfp8",
    layout=lambda out, inp: _mx.layout(out, inp, 8),
    refuses=_mx.refuses,
    quantize=quantize,
    dequantize=dequantize,
    check=check,
    bits=8.25,
)
