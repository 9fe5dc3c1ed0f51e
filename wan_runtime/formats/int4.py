"""INT4: unsigned 4-bit codes in groups along `in`, an fp32 scale and an fp32 offset a group.

slot     dtype    shape            meaning
payload  uint8    [out, in / 2]    two codes 0..15 a byte; the EVEN element in the LOW nibble
scale    float32  [out, in / g]    W = (code - 8) * scale + zero; g is in / columns
zero     float32  [out, in / g]    0 for symmetric producers, whose signed codes are stored plus 8

Quantising is symmetric (zero = 0, scale = amax / 7), so zeros stay zeros.
Source: comfy-kitchen, convrot_w4a4 (g = in) and awq_w4a16 (g = 64).
"""

from __future__ import annotations

import torch

from wan_runtime.doubts import Refuse, at_once
from wan_runtime.formats import BadSlot, Format, Slots, check_scale, check_zero_scale
from wan_runtime.formats._e2m1 import pack
from wan_runtime.formats._scaled import scale_of

GROUPS = (64, 32, 16, 128)  # what quantising takes first; one group a row fits every size
MIDDLE = 8


def _group_counts(inp: int) -> list[int]:
    return list(dict.fromkeys([*(inp // group for group in GROUPS if inp % group == 0), 1]))


def layout(out: int, inp: int) -> dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]:
    shapes = tuple((out, count) for count in _group_counts(inp))
    return {
        "payload": (torch.uint8, ((out, inp // 2),)),
        "scale": (torch.float32, shapes),
        "zero": (torch.float32, shapes),
    }


def refuses(out: int, inp: int) -> str | None:
    return f"in_features {inp} is odd, and two codes share a byte" if inp % 2 else None


def quantize(weight: torch.Tensor, per_channel: bool) -> dict[str, torch.Tensor]:
    weight = weight.float()
    out, inp = weight.shape
    groups = weight.reshape(out, _group_counts(inp)[0], -1)
    scale = scale_of(groups.abs().amax(-1), 7.0)
    codes = (groups / scale[..., None]).round().clamp(-7, 7) + MIDDLE
    return {
        "payload": pack(codes.reshape(out, inp).to(torch.uint8)),
        "scale": scale,
        "zero": torch.zeros_like(scale),
    }


def _codes(slots: Slots) -> torch.Tensor:
    """int8 [out, groups, g], -8..7."""
    payload = slots["payload"]
    codes = torch.stack((payload & 0xF, payload >> 4), dim=-1).view(torch.int8) - MIDDLE
    return codes.reshape(payload.shape[0], slots["scale"].shape[1], -1)


def dequantize(slots: Slots) -> torch.Tensor:
    weight = _codes(slots).float() * slots["scale"].float()[..., None] + slots["zero"].float()[..., None]
    return weight.reshape(slots["payload"].shape[0], -1)


def check(slots: Slots, refuse: Refuse = at_once) -> None:
    check_scale(slots, "scale", refuse)
    check_zero_scale("scale", slots["scale"] == 0, _codes(slots).any(-1), refuse)
    refuse(
        ~torch.isfinite(slots["zero"]).all(),
        lambda: BadSlot("zero", "the offset is NaN or infinite; the file is damaged."),
    )


FORMAT = Format(
    name="int4",
    layout=layout,
    refuses=refuses,
    quantize=quantize,
    dequantize=dequantize,
    check=check,
    bits=5.0,
)
