"""The faults. Each takes a file's content and gives damaged ones; none knows what the library makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tests.builders.codes import Bytes, tile_order
from tests.builders.files import Content
from tests.faults.trained import respelled

SQUARE, OBLONG = "blocks.0.self_attn.q", "blocks.0.ffn.0"
SWIZZLED = ("comfy", "lightx2v", "modelopt_comfy")
PACKED = ("nvfp4", "mxfp4", "int4")
NAN_CODES = ("fp8", "fp8_e5m2", "fp8_block", "fp8_e5m2_block", "mxfp8")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class File:
    """A file to damage. `damage` replaces some tensors (None removes one) and gives the new content."""

    content: Content
    dialect: str
    format: str

    def damaged(self, changes: dict[str, torch.Tensor | None]) -> Content:
        tensors = {**self.content.tensors, **changes}
        kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self.content, tensors=kept)

    def beside(self, module: str) -> list[str]:
        """The keys of a layer, its bias left out."""
        return [k for k in self.content.tensors if k.startswith(f"{module}.") and k != f"{module}.bias"]

    @property
    def modules(self) -> list[str]:
        return list(self.content.weights)

    def payload(self, module: str) -> str:
        keys = [k for k in self.beside(module) if self.content.tensors[k].ndim == 2]
        return max(keys, key=lambda key: self.content.tensors[key].nbytes)

    def scales(self, module: str, *, floats: bool) -> list[str]:
        """A layer's scales of the weight: floats, or the bytes of block scales."""
        found = []
        for key in self.beside(module):
            leaf, tensor = key.removeprefix(f"{module}."), self.content.tensors[key]
            named = ("scale" in leaf or leaf == "alpha") and "input" not in leaf and "zero" not in leaf
            if named and key != self.payload(module) and (tensor.element_size() > 1) == floats:
                found.append(key)
        return found


Fault = Callable[[File], Iterator[Content]]


def drop(file: File) -> Iterator[Content]:
    for key in file.beside(SQUARE):
        yield file.damaged({key: None})


def drop_everywhere(file: File) -> Iterator[Content]:
    """One kind of key from all layers, as a tool does that does not know it."""
    for key in file.beside(SQUARE):
        leaf = key.removeprefix(SQUARE)
        yield file.damaged({f"{module}{leaf}": None for module in file.modules})


def rename(file: File) -> Iterator[Content]:
    for key in file.beside(SQUARE):
        yield file.damaged({key: None, f"{key}_x": file.content.tensors[key]})


def duplicate(file: File) -> Iterator[Content]:
    """A layer again, under its other name."""
    copies = {
        respelled(SQUARE) + key.removeprefix(SQUARE): file.content.tensors[key] for key in file.beside(SQUARE)
    }
    yield file.damaged(dict(copies))


def transpose(file: File) -> Iterator[Content]:
    key = file.payload(OBLONG)
    yield file.damaged({key: file.content.tensors[key].T.contiguous()})


def transpose_square(file: File) -> Iterator[Content]:
    key = file.payload(SQUARE)
    if file.content.tensors[key].shape[0] == file.content.tensors[key].shape[1]:
        yield file.damaged({key: file.content.tensors[key].T.contiguous()})


def _swapped(file: File, modules: list[str]) -> Content:
    keys = [file.payload(module) for module in modules]
    bytes_ = {key: file.content.tensors[key].view(torch.uint8) for key in keys}
    dtypes = {key: file.content.tensors[key].dtype for key in keys}
    return file.damaged({key: ((b >> 4) | (b << 4)).view(dtypes[key]) for key, b in bytes_.items()})


def swap_nibbles(file: File) -> Iterator[Content]:
    if file.format in PACKED:
        yield _swapped(file, file.modules)


def swap_one_layers_nibbles(file: File) -> Iterator[Content]:
    if file.format in PACKED:
        yield _swapped(file, [SQUARE])


def _untile_order(tiled: Bytes) -> Bytes:
    places = np.arange(tiled.size).reshape(tiled.shape)
    low, high = (tile_order(part.astype(np.uint8)).astype(np.int64) for part in (places % 256, places // 256))
    plain = np.empty(tiled.size, dtype=np.uint8)
    plain[(low + 256 * high).reshape(-1)] = tiled.reshape(-1)
    return plain.reshape(tiled.shape)


def _mislaid(file: File, modules: list[str], order: Callable[[Bytes], Bytes]) -> Iterator[Content]:
    changes: dict[str, torch.Tensor | None] = {}
    for module in modules:
        for key in file.scales(module, floats=False):
            tensor = file.content.tensors[key]
            moved = order(tensor.view(torch.uint8).numpy())
            changes[key] = torch.from_numpy(np.ascontiguousarray(moved)).view(tensor.dtype)
    if changes:
        yield file.damaged(changes)


def mislay(file: File) -> Iterator[Content]:
    """Block scales in plain order for the tile order, or the reverse."""
    yield from _mislaid(file, file.modules, _untile_order if file.dialect in SWIZZLED else tile_order)


def mislay_one_layer(file: File) -> Iterator[Content]:
    yield from _mislaid(file, [SQUARE], _untile_order if file.dialect in SWIZZLED else tile_order)


def invert_scales(file: File) -> Iterator[Content]:
    """Of one layer, and of all: a scale that multiplies for one that divides."""
    for modules in ([SQUARE], file.modules):
        keys = [key for module in modules for key in file.scales(module, floats=True)]
        if keys:
            yield file.damaged(
                {
                    key: (1 / file.content.tensors[key].float()).to(file.content.tensors[key].dtype)
                    for key in keys
                }
            )


def spoil_scales(file: File) -> Iterator[Content]:
    """NaN, infinite, zero and negative ones, one element each."""
    for key in file.scales(SQUARE, floats=True):
        for value in (float("nan"), float("inf"), 0.0, -0.01):
            yield file.damaged({key: _with(file.content.tensors[key], value)})
    for key in file.scales(SQUARE, floats=False):
        yield file.damaged({key: _with_byte(file.content.tensors[key], 0xFF)})


def flip_scales_exponent(file: File) -> Iterator[Content]:
    """The highest exponent bit of one float scale."""
    for key in file.scales(SQUARE, floats=True):
        tensor = file.content.tensors[key].clone()
        bits = tensor.reshape(-1).view(torch.uint8)
        bits[tensor.element_size() - 1] ^= 0x40
        yield file.damaged({key: tensor})


def flip_scales_mantissa(file: File) -> Iterator[Content]:
    """The highest mantissa bit of one float scale, or the lowest of a block scale."""
    for key in file.scales(SQUARE, floats=True):
        tensor = file.content.tensors[key].clone()
        tensor.reshape(-1).view(torch.uint8)[tensor.element_size() - 2] ^= 0x40
        yield file.damaged({key: tensor})
    for key in file.scales(SQUARE, floats=False):
        byte = int(file.content.tensors[key].reshape(-1).view(torch.uint8)[0])
        yield file.damaged({key: _with_byte(file.content.tensors[key], byte ^ 1)})


def nan_code(file: File) -> Iterator[Content]:
    if file.format in NAN_CODES:
        key = file.payload(SQUARE)
        yield file.damaged({key: _with_byte(file.content.tensors[key], 0x7F)})


def spoil_weight(file: File) -> Iterator[Content]:
    """One value of an unquantised weight, which is NaN or infinite."""
    if file.format == "bf16":
        key = file.payload(SQUARE)
        for value in (float("nan"), float("inf"), float("-inf")):
            yield file.damaged({key: _with(file.content.tensors[key], value)})


def flip_weights_exponent(file: File) -> Iterator[Content]:
    """The highest exponent bit of one value of an unquantised weight, and of its bias."""
    if file.format == "bf16":
        for key in (file.payload(SQUARE), f"{SQUARE}.bias"):
            tensor = file.content.tensors[key].clone()
            tensor.reshape(-1)[len(tensor) // 3 :].view(torch.uint8)[1] ^= 0x40
            yield file.damaged({key: tensor})


def flip_code(file: File) -> Iterator[Content]:
    """The lowest bit of one code, or of one unquantised weight."""
    key = file.payload(SQUARE)
    byte = int(file.content.tensors[key].reshape(-1).view(torch.uint8)[0])
    yield file.damaged({key: _with_byte(file.content.tensors[key], byte ^ 1)})


def _with(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.reshape(-1)[0] = value
    return changed


def _with_byte(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.reshape(-1).view(torch.uint8)[0] = byte
    return changed


# What information in the file can tell: read right where the fault changes no weight, or refused.
TELLABLE: dict[str, Fault] = {
    "drop": drop,
    "drop everywhere": drop_everywhere,
    "rename": rename,
    "duplicate": duplicate,
    "transpose": transpose,
    "swap nibbles": swap_nibbles,
    "swizzle or unswizzle": mislay,
    "invert scales": invert_scales,
    "spoil scales": spoil_scales,
    "flip a scale's exponent": flip_scales_exponent,
    "code to NaN": nan_code,
    "weight to NaN": spoil_weight,
    "flip a weight's exponent": flip_weights_exponent,
}
# What no reader can tell: the result is another valid file.
UNTELLABLE: dict[str, Fault] = {
    "transpose a square weight": transpose_square,
    "swap one layer's nibbles": swap_one_layers_nibbles,
    "swizzle or unswizzle one layer": mislay_one_layer,
    "flip a scale's mantissa": flip_scales_mantissa,
    "flip a code's lowest bit": flip_code,
}
