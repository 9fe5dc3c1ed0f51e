"""One byte a weight and fp32 scales that multiply: the arithmetic of the FP8 and int8 formats.

A scale covers the tensor, an output channel, or a block. Blocks of r x c start at element (0, 0) and the last ones may
be cut short, so the scales of a block format are [ceil(out / r), ceil(in / c)]. That shape says r and c: only one power
of two gives a count of two or more, and a count of one is the whole side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from wan_runtime.doubts import Refuse, absent, at_once
from wan_runtime.formats import BadSlot, Format, Slots, check_scale, check_zero_scale, strips
from wan_runtime.formats._bytes import numbers

Layout = dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]
SIDE = 128  # of the blocks that quantising takes
BLOCKS = tuple((rows, cols) for cols in (128, 64, 32, 16, 256) for rows in (cols, 1))


@dataclass(frozen=True)
class Codes:
    """One encoding of a byte.

    top        its largest finite code.
    magnitude  the bits of a byte that grow with the magnitude, and are 0 where it is (fp8 has a negative zero). Of
               int8's two's complement that is no more than whether a byte is 0.
    invalid    the first magnitude, in those bits, that is NaN or infinite, or None where all are finite.
    """

    dtype: torch.dtype
    top: float
    magnitude: int
    invalid: int | None


E4M3 = Codes(torch.float8_e4m3fn, 448.0, 0x7F, 0x7F)
E5M2 = Codes(torch.float8_e5m2, 57344.0, 0x7F, 0x7C)
INT8 = Codes(torch.int8, 127.0, 0xFF, None)


def make(name: str, codes: Codes, *, blocks: bool = False) -> Format:
    """The Format record of one encoding, with scales a tensor or an output channel, or with scales a block."""
    return Format(
        name=name,
        layout=_block_layout if blocks else _layout,
        refuses=lambda out, inp: None,
        quantize=lambda weight, per_channel: _quantize(weight, per_channel, codes, blocks),
        dequantize=lambda slots: _dequantize(slots, codes),
        check=functools.partial(_check, codes),
        bits=8 + 32 / SIDE**2 if blocks else 8.0,
    )


def _layout(out: int, inp: int) -> Layout:
    return {"payload": (torch.uint8, ((out, inp),)), "scale": (torch.float32, ((1, 1), (out, 1)))}


def _block_layout(out: int, inp: int) -> Layout:
    shapes = dict.fromkeys((-(-out // rows), -(-inp // cols)) for rows, cols in BLOCKS)
    return {"payload": (torch.uint8, ((out, inp),)), "scale": (torch.float32, tuple(shapes))}


def side(size: int, count: int) -> int:
    """How many of `size` elements each of `count` scales covers: all of them, or a power of two."""
    if count == 1:
        return size
    length = 1
    while -(-size // length) > count:
        length *= 2
    if -(-size // length) != count:
        raise BadSlot("scale", f"{count} scales do not cover {size} elements in blocks of a power of two.")
    return length


def spread(scale: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Scales -> a tensor that broadcasts against [out, in]."""
    rows, cols = side(out, scale.shape[0]), side(inp, scale.shape[1])
    if rows not in (1, out):
        scale = scale.repeat_interleave(rows, 0)[:out]
    return scale if cols == inp else scale.repeat_interleave(cols, 1)[:, :inp]


def scale_of(amax: torch.Tensor, top: float) -> torch.Tensor:
    """amax / largest code; 1 for zeros, and never 0 by underflow."""
    step = (amax / top).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax > 0, step, torch.ones_like(amax))


def _quantize(weight: torch.Tensor, per_channel: bool, codes: Codes, blocks: bool) -> dict[str, torch.Tensor]:
    """Scale = amax / largest code; codes clamped, because torch < 2.12 casts an e4m3 overflow to NaN."""
    weight = weight.float()
    size = weight.abs()
    if blocks:
        amax = torch.nn.functional.max_pool2d(size[None], SIDE, ceil_mode=True)[0]
    else:
        amax = size.amax(1, keepdim=True) if per_channel else size.amax().reshape(1, 1)
    scale = scale_of(amax, codes.top)
    quotient = (weight / spread(scale, *weight.shape)).clamp(-codes.top, codes.top)
    rounded = (
        quotient.round() if codes.dtype is torch.int8 else quotient
    )  # casting to fp8 rounds, to int8 truncates
    return {"payload": rounded.to(codes.dtype).view(torch.uint8), "scale": scale}


def _dequantize(slots: Slots, codes: Codes) -> torch.Tensor:
    values = numbers(slots["payload"], codes.dtype)
    return values * spread(slots["scale"].float(), *values.shape)


def _check(codes: Codes, slots: Slots, refuse: Refuse = at_once) -> None:
    payload, zero = slots["payload"], slots["scale"] == 0
    largest = check_codes(payload, codes, refuse)
    check_scale(slots, "scale", refuse)
    if absent(zero.any()):
        return
    used = largest != 0 if zero.shape[1] == 1 else payload & codes.magnitude != 0
    check_zero_scale("scale", spread(zero, *used.shape), used, refuse)


def check_codes(payload: torch.Tensor, codes: Codes, refuse: Refuse = at_once) -> torch.Tensor:
    """Refuse codes that are no numbers; returns each row's largest magnitude, as a byte [out, 1]."""
    largest = payload.new_zeros(payload.shape[0])
    if payload.numel():
        runs = strips(payload)
        for run, place in zip(runs, largest.split([len(run) for run in runs]), strict=True):
            torch.amax(run & codes.magnitude, 1, out=place)  # a run's own result would split the CPU's heap
    if codes.invalid is not None:
        bad = largest >= codes.invalid
        refuse(
            bad.any(),
            lambda: BadSlot(
                "payload",
                f"codes in {int(bad.sum())} of its {len(bad)} rows are NaN or infinite; the file is damaged.",
            ),
        )
    return largest[:, None]
