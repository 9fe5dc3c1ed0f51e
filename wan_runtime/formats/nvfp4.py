"""NVFP4: 4-bit E2M1 codes in blocks of 16 along `in`, an E4M3 scale a block, one fp32 scale a tensor.

slot         dtype    shape           meaning
payload      uint8    [out, in / 2]   two codes a byte; the EVEN element in the LOW nibble
block_scale  uint8    [out, in / 16]  the e4m3fn bytes, plain row-major (not swizzled)
scale        float32  [1, 1]          multiplies: W = E2M1[code] * block_scale * scale

E2M1 magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6 for the codes 0 to 7; bit 3 is the sign. Quantising takes
scale = amax / (6 * 448) and block_scale = block amax / 6 / scale, rounded to e4m3.
Source: NVIDIA Model Optimizer, nvfp4_tensor.py; OCP Microscaling Formats Specification for E2M1.
"""

from __future__ import annotations

import torch

from wan_runtime.doubts import Refuse, at_once
from wan_runtime.formats import BadSlot, Format, Slots, check_scale, check_zero_scale, strips
from wan_runtime.formats._bytes import numbers
from wan_runtime.formats._e2m1 import E2M1_MAX, pack, round_to_e2m1, unpack
from wan_runtime.formats._scaled import scale_of

BLOCK = 16
E4M3_MAX = 448.0
LARGEST = E2M1_MAX * E4M3_MAX  # what a scale of 1 reaches
SMALLEST_BLOCK_SCALE = 2.0**-9  # the smallest e4m3 subnormal: a block of tiny weights must not get scale 0


def layout(out: int, inp: int) -> dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]:
    return {
        "payload": (torch.uint8, ((out, inp // 2),)),
        "block_scale": (torch.uint8, ((out, inp // BLOCK),)),
        "scale": (torch.float32, ((1, 1),)),
    }


def refuses(out: int, inp: int) -> str | None:
    return f"in_features {inp} is not a multiple of {BLOCK}" if inp % BLOCK else None


def quantize(weight: torch.Tensor, per_channel: bool) -> dict[str, torch.Tensor]:
    """Two-level amax rule, one fp32 scale a tensor whatever `per_channel`.

    A block of zeros gets the smallest block scale, a tensor of zeros the scale 1.
    """
    return quantize_by(weight, scale_for(weight.float().abs().amax()).reshape(1, 1))


def scale_for(amax: torch.Tensor) -> torch.Tensor:
    """The scale a tensor, of its largest magnitude."""
    return scale_of(amax, LARGEST)


def quantize_by(values: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values [out, in] -> the slots that a scale [1, 1] gives them; what is beyond its reach saturates.

    A block with NaN or infinity gets the block scale NaN.
    """
    out, inp = values.shape
    blocks = values.float().reshape(out, inp // BLOCK, BLOCK)
    amax = blocks.abs().amax(-1)
    block_scale = amax.where(amax.isfinite(), torch.nan) / E2M1_MAX / scale
    block_scale = block_scale.clamp(SMALLEST_BLOCK_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = round_to_e2m1(blocks / (block_scale.float() * scale)[..., None])
    return {
        "payload": pack(codes.reshape(out, inp)),
        "block_scale": block_scale.view(torch.uint8),
        "scale": scale,
    }


def dequantize(slots: Slots) -> torch.Tensor:
    values, scales = unpack(slots["payload"]), numbers(slots["block_scale"], torch.float8_e4m3fn)
    out, inp = values.shape
    scales = scales * slots["scale"].float()
    return (values.reshape(out, inp // BLOCK, BLOCK) * scales[..., None]).reshape(out, inp)


def check(slots: Slots, refuse: Refuse = at_once) -> None:
    block_scale = slots["block_scale"]
    count, bad = block_scale.numel(), ((block_scale & 0x7F) == 0x7F).sum()
    refuse(
        bad > 0,
        lambda: BadSlot("block_scale", f"{int(bad)} of {count} block scales are NaN; the file is damaged."),
    )
    negative = (block_scale > 0x80).sum()
    refuse(
        negative > 0,
        lambda: BadSlot(
            "block_scale",
            f"{int(negative)} of {count} block scales are negative; no quantiser writes that (are the scales laid out "
            "differently, or is the file damaged?).",
        ),
    )
    check_scale(slots, "scale", refuse)
    # -0 is a zero too, so the sign bits do not count.
    blocks = block_scale.shape[1]
    parts = [(strip & 0x77).reshape(strip.shape[0], blocks, -1).any(-1) for strip in strips(slots["payload"])]
    used = torch.cat(parts)
    check_zero_scale("scale", slots["scale"] == 0, used.any().reshape(1, 1), refuse)
    check_zero_scale("block_scale", (block_scale & 0x7F) == 0, used, refuse)


FORMAT = Format(
    name="nvfp4",
    layout=layout,
    refuses=refuses,
    quantize=quantize,
    dequantize=dequantize,
    check=check,
    bits=4.5,
)
