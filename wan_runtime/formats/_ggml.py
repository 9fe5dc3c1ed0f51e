"""The weight types of ggml, as GGUF files hold them: read and kept in their own bytes, never written.

Each has one slot, `payload` uint8 [out, bytes a row]: a row is a chain of blocks of 32 or 256 weights, and a block has
its scales beside its codes (d, m: fp16). What lies in a block, in order:

type   weights  bytes  layout                                                          W =
q8_0   32       34     d, 32 int8                                                      d * q
q4_0   32       18     d, 16 x two nibbles                                             d * (q - 8)
q4_1   32       20     d, m, 16 x two nibbles                                          d * q + m
q5_0   32       22     d, 4 bytes of high bits, 16 x two nibbles                       d * (q - 16)
q5_1   32       24     d, m, 4 bytes of high bits, 16 x two nibbles                    d * q + m
q2_k   256      84     16 x (4-bit scale low, 4-bit min high), 64 x four 2 bits, d, m  d * scale * q - m * min
q3_k   256      110    32 bytes of high bits, 64 x four 2 bits, 12 bytes of 6-bit      d * (scale - 32) * (q - 4)
                       scales, d
q4_k   256      144    d, m, 12 bytes of 6-bit scales and mins, 128 x two nibbles      d * scale * q - m * min
q5_k   256      176    as q4_k with 32 bytes of high bits before the nibbles           d * scale * q - m * min
q6_k   256      210    128 x two nibbles, 64 x four 2 bits, 16 int8 scales, d          d * scale * (q - 32)

A byte's nibbles are not neighbours: of a run of bytes, the low nibbles (or lowest bits) come first, all of them, then
the next ones. Source: ggml, ggml-common.h and ggml-quants.c; tests hold it to the gguf package's `quants.dequantize`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from wan_runtime.doubts import Refuse, at_once
from wan_runtime.formats import BadSlot, Format, Slots

PREFIX = "ggml_"
SMALL, LARGE = 32, 256


@dataclass(frozen=True)
class Block:
    """One type. `halves` are the offsets of its fp16 numbers; decode: blocks uint8 [n, bytes] -> fp32 [n, weights]."""

    weights: int
    nbytes: int
    halves: tuple[int, ...]
    decode: Callable[[torch.Tensor], torch.Tensor]


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The fp16 number at a byte offset of each block, fp32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _planes(data: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """Codes of `bits` bits [n, bytes * 8 / bits]: of each `run` bytes first all lowest bits, then all next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    planes = data.reshape(data.shape[0], -1, 1, run) >> shifts[:, None]
    return (planes & ((1 << bits) - 1)).flatten(1)


def _times(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Scales [n, groups] times codes [n, weights], each scale over its group of weights."""
    return scale[..., None] * codes.float().reshape(len(codes), scale.shape[1], -1)


def _bits_of_five(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """5-bit codes [n, 32]: bit j of the four bytes is the high bit of weight j."""
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, at : at + 4, None] >> places & 1).flatten(1)
    return _planes(blocks[:, at + 4 :], 16, 4) | high << 4


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_planes(blocks[:, 2:], 16, 4).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _planes(blocks[:, 4:], 16, 4).float() + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_bits_of_five(blocks, 2).float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _bits_of_five(blocks, 4).float() + _half(blocks, 2)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    pairs, codes = blocks[:, :16], _planes(blocks[:, 16:80], 32, 2)
    scale, least = _half(blocks, 80) * (pairs & 15).float(), _half(blocks, 82) * (pairs >> 4).float()
    return (_times(scale, codes) - least[..., None]).flatten(1)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    high, low = _planes(blocks[:, :32], 32, 1), _planes(blocks[:, 32:96], 32, 2)
    six = _planes(blocks[:, 96:104], 8, 4) | _planes(blocks[:, 104:108], 4, 2) << 4
    scale = _half(blocks, 108) * (six.float() - 32)
    return _times(scale, (low | high << 2).float() - 4).flatten(1)


def _scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes a block -> eight 6-bit scales and eight 6-bit mins, fp32 [n, 8]."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    mins = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales.float(), mins.float()


def _with_mins(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    least = _half(blocks, 2) * mins
    return (_times(_half(blocks, 0) * scales, codes) - least[..., None]).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _with_mins(blocks, _planes(blocks[:, 16:], 32, 4))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    return _with_mins(blocks, _planes(blocks[:, 48:], 32, 4) | _planes(blocks[:, 16:48], 32, 1) << 4)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _planes(blocks[:, :128], 64, 4) | _planes(blocks[:, 128:192], 32, 2) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _times(scale, codes.float() - 32).flatten(1)


BLOCKS: Mapping[str, Block] = {
    "q8_0": Block(SMALL, 34, (0,), _q8_0),
    "q4_0": Block(SMALL, 18, (0,), _q4_0),
    "q4_1": Block(SMALL, 20, (0, 2), _q4_1),
    "q5_0": Block(SMALL, 22, (0,), _q5_0),
    "q5_1": Block(SMALL, 24, (0, 2), _q5_1),
    "q2_k": Block(LARGE, 84, (80, 82), _q2_k),
    "q3_k": Block(LARGE, 110, (108,), _q3_k),
    "q4_k": Block(LARGE, 144, (0, 2), _q4_k),
    "q5_k": Block(LARGE, 176, (0, 2), _q5_k),
    "q6_k": Block(LARGE, 210, (208,), _q6_k),
}


def _blocks(slots: Slots, block: Block) -> torch.Tensor:
    return slots["payload"].reshape(-1, block.nbytes)


def _check(block: Block, slots: Slots, refuse: Refuse = at_once) -> None:
    blocks = _blocks(slots, block)
    bad = torch.stack([(~_half(blocks, at).isfinite()).sum() for at in block.halves]).sum()
    refuse(
        bad > 0,
        lambda: BadSlot(
            "payload", f"{int(bad)} of its blocks' scales are NaN or infinite; the file is damaged."
        ),
    )


def _sizes(slots: Slots, block: Block) -> torch.Tensor:
    """Of each row, the largest magnitude of each of its blocks' fp16 numbers: fp32 [out, numbers a block]."""
    blocks, rows = _blocks(slots, block), slots["payload"].shape[0]
    return torch.stack([_half(blocks, at).abs().reshape(rows, -1).amax(1) for at in block.halves], dim=1)


def _quantize(weight: torch.Tensor, per_channel: bool) -> dict[str, torch.Tensor]:
    raise NotImplementedError(
        "ggml's types are read from GGUF files, not written; quantise to another format"
    )


def _make(name: str, block: Block) -> Format:
    def layout(out: int, inp: int) -> dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]:
        return {"payload": (torch.uint8, ((out, inp // block.weights * block.nbytes),))}

    def refuses(out: int, inp: int) -> str | None:
        return f"in_features {inp} is not a multiple of {block.weights}" if inp % block.weights else None

    def dequantize(slots: Slots) -> torch.Tensor:
        return block.decode(_blocks(slots, block)).reshape(slots["payload"].shape[0], -1)

    return Format(
        name=PREFIX + name,
        layout=layout,
        refuses=refuses,
        quantize=_quantize,
        dequantize=dequantize,
        check=functools.partial(_check, block),
        bits=8 * block.nbytes / block.weights,
        sizes=functools.partial(_sizes, block=block),
    )


FORMATS: Mapping[str, Format] = {PREFIX + name: _make(name, block) for name, block in BLOCKS.items()}
