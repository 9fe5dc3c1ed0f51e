"""What the MX formats share: blocks of 32 along `in`, and one E8M0 byte a block, which means 2^(byte - 127).

Quantising takes the smallest power of two that brings the block's amax within the largest code, so nothing saturates
(the OCP specification's floor would clip). A block of zeros gets byte 0, one with NaN or infinity byte 255.
"""

from __future__ import annotations

import math

import torch

from wan_runtime.doubts import Refuse, at_once
from wan_runtime.formats import BadSlot, Slots
from wan_runtime.formats._bytes import numbers

BLOCK = 32
BIAS = 127
NAN = 255


def refuses(out: int, inp: int) -> str | None:
    return f"in_features {inp} is not a multiple of {BLOCK}" if inp % BLOCK else None


def layout(out: int, inp: int, bits: int) -> dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]:
    return {
        "payload": (torch.uint8, ((out, inp * bits // 8),)),
        "block_scale": (torch.uint8, ((out, inp // BLOCK),)),
    }


def scaled(weight: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [out, in] -> (weight / block scale [out, in], within +-top up to rounding; block scales, uint8)."""
    out, inp = weight.shape
    blocks = weight.float().reshape(out, inp // BLOCK, BLOCK)
    # amax = m * 2^e and top = n * 2^k with m, n in [0.5, 1): amax / 2^(e - k) fits when m <= n. No division, no log.
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1))
    fraction, power = math.frexp(top)
    byte = exponent - power + (mantissa > fraction) + BIAS
    byte = torch.where(mantissa > 0, byte, 0).clamp(0, NAN - 1)
    byte = torch.where(torch.isfinite(mantissa), byte, NAN).to(torch.uint8)
    return (blocks / values(byte)[..., None]).reshape(out, inp), byte


def values(block_scale: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes -> fp32 powers of two."""
    return numbers(block_scale, torch.float8_e8m0fnu)


def times(codes: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Values of the codes [out, in] times their blocks' scales."""
    out, inp = codes.shape
    return (codes.reshape(out, inp // BLOCK, BLOCK) * values(block_scale)[..., None]).reshape(out, inp)


def check(slots: Slots, refuse: Refuse = at_once) -> None:
    """Refuse block scales that are NaN."""
    count, bad = slots["block_scale"].numel(), (slots["block_scale"] == NAN).sum()
    refuse(
        bad > 0,
        lambda: BadSlot(
            "block_scale", f"{int(bad)} of {count} block scales are NaN (byte {NAN}); the file is damaged."
        ),
    )
