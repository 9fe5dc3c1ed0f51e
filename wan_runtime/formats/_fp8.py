"""The arithmetic that the two FP8 encodings share: one byte a weight, one fp32 scale a tensor or an output channel."""

from __future__ import annotations

import torch

from wan_runtime.formats import BadSlot, Format, Slots, check_scale, check_zero_scale


def layout(out: int, inp: int) -> dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]:
    return {
        "payload": (torch.uint8, ((out, inp),)),
        "scale": (torch.float32, ((1, 1), (out, 1))),
    }


def refuses(out: int, inp: int) -> str | None:
    return None


def quantize(weight: torch.Tensor, per_channel: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Scale = amax / largest code, 1 for zeros; codes clamped, because torch < 2.12 casts an overflow to NaN."""
    top = torch.finfo(dtype).max
    weight = weight.float()
    amax = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax().reshape(1, 1)
    step = (amax / top).clamp_min(torch.finfo(torch.float32).tiny)  # never 0 by underflow
    scale = torch.where(amax > 0, step, torch.ones_like(amax))
    codes = (weight / scale).clamp(-top, top).to(dtype)
    return {"payload": codes.view(torch.uint8), "scale": scale}


def dequantize(slots: Slots, dtype: torch.dtype) -> torch.Tensor:
    return slots["payload"].view(dtype).float() * slots["scale"].float()


def check(slots: Slots, dtype: torch.dtype) -> None:
    codes = slots["payload"].view(dtype)
    magnitude = slots["payload"] & 0x7F
    # e4m3fn has one NaN code (0x7F); e5m2 has infinities (0x7C) and NaNs above them.
    limit = 0x7F if dtype is torch.float8_e4m3fn else 0x7C
    bad = int((magnitude >= limit).sum())
    if bad:
        raise BadSlot("payload", f"{bad} of {codes.numel()} codes are NaN or infinite; the file is damaged.")
    check_scale(slots, "scale")
    used = (
        magnitude.any(dim=1, keepdim=True) if slots["scale"].shape[0] > 1 else magnitude.any().reshape(1, 1)
    )
    check_zero_scale(slots, "scale", used)


def make(name: str, dtype: torch.dtype) -> Format:
    """The Format record of one FP8 encoding."""
    return Format(
        name=name,
        layout=layout,
        refuses=refuses,
        quantize=lambda weight, per_channel: quantize(weight, per_channel, dtype),
        dequantize=lambda slots: dequantize(slots, dtype),
        check=lambda slots: check(slots, dtype),
        bits=8.0,
    )
