"""The faults of GGUF's tensors in blocks. A block holds its scale, so nothing lies beside a weight but its bias.

Left out, as nothing in a GGUF file could be written so: nibbles swapped and block scales swizzled (the type says how a
block lies, and all tools share ggml's code), a code made NaN (they are integers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tests.builders.files import Content
from tests.builders.ggml import Blocks, dequantised, quantised
from tests.faults import kinds
from tests.faults.kinds import OBLONG, SQUARE, Fault, File

# type -> bytes a block, and the offsets of its fp16 numbers; ggml-common.h
LAYOUT = {
    "Q8_0": (34, (0,)),
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
}


def _kind(file: File) -> str:
    assert isinstance(file.content, Blocks)
    return file.content.kind


def _changed(file: File, modules: list[str], change: Callable[[torch.Tensor], None]) -> Content:
    """`change` works in place on a copy of a layer's blocks, uint8 [n, bytes a block]."""
    changes: dict[str, torch.Tensor | None] = {}
    for module in modules:
        blocks = file.content.tensors[f"{module}.weight"].clone()
        change(blocks.reshape(-1, LAYOUT[_kind(file)][0]))
        changes[f"{module}.weight"] = blocks
    return file.damaged(changes)


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The fp16 numbers at an offset, one a block; a copy."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)[:, 0]


def _one(file: File, at: int, value: float) -> Content:
    """One block, in the middle of the layer, with another fp16 number."""

    def change(blocks: torch.Tensor) -> None:
        blocks[len(blocks) // 3, at : at + 2] = torch.tensor([value]).half().view(torch.uint8)

    return _changed(file, [SQUARE], change)


def _flipped(file: File, byte: int, bit: int) -> Content:
    def change(blocks: torch.Tensor) -> None:
        blocks[len(blocks) // 3, byte] ^= bit

    return _changed(file, [SQUARE], change)


def _transposed(file: File, module: str) -> Content:
    key, kind = f"{module}.weight", _kind(file)
    weight = dequantised(file.content.tensors[key], kind)
    return file.damaged({key: quantised(weight.T.contiguous(), kind)})


def transpose(file: File) -> Iterator[Content]:
    yield _transposed(file, OBLONG)


def transpose_square(file: File) -> Iterator[Content]:
    yield _transposed(file, SQUARE)


def invert_scales(file: File) -> Iterator[Content]:
    """Of one layer, and of all."""

    def change(blocks: torch.Tensor) -> None:
        inverse = 1 / _halves(blocks, 0).float()
        blocks[:, :2] = inverse.half()[:, None].view(torch.uint8)

    for modules in ([SQUARE], file.modules):
        yield _changed(file, modules, change)


def spoil_scales(file: File) -> Iterator[Content]:
    """NaN and infinity."""
    for at in LAYOUT[_kind(file)][1]:
        for value in (float("nan"), float("inf"), float("-inf")):
            yield _one(file, at, value)


def flip_scales_exponent(file: File) -> Iterator[Content]:
    """The highest exponent bit of one block's scale, and of its minimum."""
    for at in LAYOUT[_kind(file)][1]:
        yield _flipped(file, at + 1, 0x40)


def other_scale(file: File) -> Iterator[Content]:
    """Zero, and the sign turned: ggml's own quantiser writes scales of either sign, and zero where they underflow."""
    yield _one(file, 0, 0.0)
    yield _flipped(file, 1, 0x80)


def flip_scales_mantissa(file: File) -> Iterator[Content]:
    yield _flipped(file, 1, 0x02)


def flip_code(file: File) -> Iterator[Content]:
    yield _flipped(file, LAYOUT[_kind(file)][0] - 1, 1)


TELLABLE: dict[str, Fault] = {
    **{name: kinds.TELLABLE[name] for name in ("drop", "drop everywhere", "rename", "duplicate")},
    "transpose": transpose,
    "invert scales": invert_scales,
    "spoil scales": spoil_scales,
    "flip a scale's exponent": flip_scales_exponent,
}
UNTELLABLE: dict[str, Fault] = {
    "transpose a square weight": transpose_square,
    "zero or negate a block's scale": other_scale,
    "flip a scale's mantissa": flip_scales_mantissa,
    "flip a code's lowest bit": flip_code,
}
