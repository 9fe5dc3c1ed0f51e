"""The layers of ComfyUI's formats (B1 to B11): from a record and the keys beside the weight to canonical slots.

FP8, int8, NVFP4 and MXFP8 keep their bytes; the formats of 4-bit integers are in _comfy_int4.py. A weight whose rows
were padded for the tensor cores is cut to the record's `orig_shape`, or to as many rows as its bias has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from wan_runtime.dialects import Layer, Source, _comfy_int4, _corrections, _keys, _scaled, _swizzle
from wan_runtime.dialects._comfy_records import Record
from wan_runtime.dialects._comfy_scheme import Scheme, rotation
from wan_runtime.errors import BadTensor
from wan_runtime.header import Header

# Keys of any record that leave the weight's value unchanged, and those that must agree with what is read.
HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype"}
CHECKED = {"orig_shape", "group_size", "per_row"}
CODES = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8_e5m2", "fp8": "fp8"}


def layer(header: Header, path: str, record: Record) -> Layer:
    """The layer that a record describes.

    Raises BadTensor for a format or a key that is not known, and where record and tensors disagree.
    """
    key = f"{path}.weight"
    if key not in header.entries:
        raise BadTensor(header.path, f"{path}.comfy_quant", "its layer has no weight in the file.")
    name = str(record.get("format"))
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise BadTensor(
            header.path,
            key,
            f"its record says format {record.get('format')!r}; this dialect reads {', '.join(SCHEMES)}.",
        )
    _refuse_unknown(header, key, record, scheme)
    entry = header.entries[key]
    if entry.dtype not in scheme.dtypes or len(entry.shape) != 2:
        raise BadTensor(
            header.path, key, f"its record says {name} and it is {entry.dtype} {list(entry.shape)}."
        )
    made, group = scheme.read(header, path, record)
    made = _cut(header, made, record, scheme.pads)
    _refuse_disagreement(header, made, record, group)
    return made


def _refuse_unknown(header: Header, key: str, record: Record, scheme: Scheme) -> None:
    # A rotation that is said not to be there is none, whatever the format.
    known = HARMLESS | CHECKED | scheme.knows | ({"convrot"} if record.get("convrot") is False else set())
    unknown = sorted(record.keys() - known)
    if unknown:
        raise BadTensor(
            header.path,
            key,
            f"its record asks for {', '.join(unknown)}, which is not understood for {record['format']}; ignoring it is "
            "noise.",
        )


def _refuse_disagreement(header: Header, layer: Layer, record: Record, group: int | None) -> None:
    """Hold the layer against what its record says of it: other blocks would be misread."""
    scales = [header.entries[s.key].numel for s in layer.sources if s.slot == "scale"]
    real = {"orig_shape": list(layer.shape), "group_size": group, "per_row": scales == [layer.shape[0]]}
    for name, value in real.items():
        if record.get(name) not in (None, value):
            raise BadTensor(
                header.path,
                f"{layer.module}.weight",
                f"its record says {name} {record[name]!r}, and this reading has {value!r}.",
            )


def _cut(header: Header, layer: Layer, record: Record, pads: int) -> Layer:
    """The layer with the logical shape of a weight that was padded to multiples of `pads`."""
    rows, cols = layer.shape
    bias = header.entries.get(f"{layer.module}.bias")
    out = bias.shape[0] if bias is not None and len(bias.shape) == 1 else None
    match record.get("orig_shape") or [rows if out is None else out, cols]:
        case [int(height), int(width)] if (_up(height, pads), _up(width, pads)) == (rows, cols):
            if out in (None, height):
                return dataclasses.replace(layer, shape=(height, width))
    return layer  # what the record says is held against it next, and the bias against the model


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _scaled_codes(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    """FP8 and int8: the scale's shape says what one covers, whatever the name of the format.

    The weight's own dtype decides between E4M3 and E5M2; codes stored as bytes have the record alone.
    """
    name = str(record["format"])
    base = CODES.get(name, "fp8")
    layer = _scaled.layer(header, path, base)
    scale = header.entries[f"{path}.weight_scale"]
    if name == "float8_e4m3fn_rowwise" and scale.numel != layer.shape[0]:
        raise BadTensor(
            header.path,
            f"{path}.weight_scale",
            f"its record says one scale a row; it has {list(scale.shape)}.",
        )
    if "convrot" in record or "convrot_groupsize" in record:
        turned = rotation(header, path, record, always=False)
        layer = dataclasses.replace(layer, sources=(*layer.sources, *turned))
    return layer, _group_of(layer, scale.shape, record.get("group_size"))


def _group_of(layer: Layer, scales: tuple[int, ...], said: object) -> int | None:
    """The group size that the record says, where as many scales go with it; a power of two that does, otherwise."""
    out, inp = layer.shape
    flat = tuple(n for n in scales if n != 1)
    for size in (said, *(2**n for n in range(4, 10))):
        if isinstance(size, int) and size > 0:
            cols = -(-inp // size)
            grids = ((-(-out // size), cols), (out, cols))
            if flat in (tuple(n for n in grid if n != 1) for grid in grids) and (flat or size == said):
                return size
    return None


def _nvfp4(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    payload = Source(f"{path}.weight", "payload", _nvfp4_payload)
    block_scale = Source(f"{path}.weight_scale", "block_scale", _nvfp4_scales)
    layer = _keys.nvfp4_layer(header, path, payload, block_scale)
    return _corrections.smoothed(header, layer), 16


def swap_nibbles(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of two 4-bit codes -> the codes the other way round."""
    return (tensor >> 4) | ((tensor & 0xF) << 4)


def _nvfp4_payload(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return swap_nibbles(tensor[:out, : inp // 2])


def _nvfp4_scales(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return _swizzle.unswizzle(tensor.view(torch.uint8), out, inp // 16)


def _mxfp8(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    key, scale = f"{path}.weight", f"{path}.weight_scale"
    entry = header.entries[key]
    if scale not in header.entries:
        raise BadTensor(header.path, key, "it is MXFP8 and its weight_scale is missing.")
    if header.entries[scale].dtype not in ("U8", "F8_E8M0"):
        raise BadTensor(
            header.path,
            scale,
            f"MXFP8 block scales are F8_E8M0 or U8; these are {header.entries[scale].dtype}.",
        )
    sources = (Source(key, "payload", _mxfp8_payload), Source(scale, "block_scale", _mxfp8_scales))
    return Layer(path, "mxfp8", (entry.shape[0], entry.shape[1]), sources), 32


def _mxfp8_payload(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return tensor.view(torch.uint8)[:out, :inp].contiguous()


def _mxfp8_scales(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return _swizzle.unswizzle(tensor.view(torch.uint8), out, inp // 32)


def _hybrid_mxfp8(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    """MXFP8, and a scale a tensor for GPUs that take no block scales: the weight is already whole without it."""
    key = f"{path}.weight_scalar"
    if key not in header.entries:
        raise BadTensor(header.path, f"{path}.weight", "it is hybrid_mxfp8 and its weight_scalar is missing.")
    layer, group = _mxfp8(header, path, record)
    spare = Source(key, "spare", _keys.scalar_slot)
    return dataclasses.replace(layer, sources=(*layer.sources, spare), finish=_without_spare), group


def _without_spare(given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    spare = given["spare"].item()
    if not 0 < spare < float("inf"):
        raise ValueError(
            f"its weight_scalar is {spare:g}; a scale is positive and finite. The file is damaged."
        )
    return {name: tensor for name, tensor in given.items() if name != "spare"}


_BYTES = (*_keys.FP8, "U8")
_FP8: Sequence[str] = (
    "float8_e4m3fn", "float8_e5m2", "fp8", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
)  # fmt: skip
SCHEMES: Mapping[str, Scheme] = {
    **{name: Scheme(_scaled_codes, _BYTES) for name in _FP8},
    "int8_tensorwise": Scheme(_scaled_codes, ("I8",), frozenset({"convrot", "convrot_groupsize"})),
    "int8_blockwise": Scheme(_scaled_codes, ("I8",)),
    "nvfp4": Scheme(_nvfp4, ("U8",), pads=16),
    "mxfp8": Scheme(_mxfp8, ("F8_E4M3", "U8"), pads=32),
    "hybrid_mxfp8": Scheme(_hybrid_mxfp8, ("F8_E4M3", "U8"), pads=32),
    **_comfy_int4.SCHEMES,
}
