"""torchao's safetensors (I1): each tensor subclass flattened into plain tensors, with a JSON record in the header.

key                              dtype, shape               meaning, by the record's `_type`
X._weight_qdata                  F8_E4M3 [out, in]          Float8Tensor
                                 I8 [out, in]               Int8Tensor
                                 U8 [out, in / 2]           NVFP4Tensor; the EVEN element in the LOW nibble
                                 F8_E4M3, U8                MXTensor by `elem_dtype`: float8_e4m3fn [out, in],
                                                            float4_e2m1fn_x2 [out, in / 2] EVEN LOW,
                                                            fp6_e3m2 [out, in], one code a byte
X._weight_scale                  F32 [out / r, in / c]      W = code * scale of its r x c block, `block_size` = [r, c]
                                 F8_E4M3, F8_E8M0           block scales; SWIZZLED or plain as `is_swizzled_scales` says
X._weight_per_tensor_scale       F32 (), optional           NVFP4Tensor: multiplies
X._weight_act_per_tensor_scale   F32 (), optional           activation amax / 2688
X._weight_zero_point             I8, optional               Int8Tensor: zeros; others are refused
X._weight_act_pre_scale          float [in], optional       the input is multiplied by it first

Header metadata: `tensor_names` = JSON list of "X.weight", "X.bias", ...; and under each name JSON with `_type`, `_data`
and `_tensor_data_names`. An unknown type or tensor is refused by name.
Source: torchao 0.18, prototype/safetensors, quantization/quantize_/workflows, prototype/mx_formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys, _swizzle
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.formats import mxfp6
from wan_runtime.header import Header

NAMES = "tensor_names"
BESIDE = frozenset(("qdata", "scale"))
ELEMENTS = {"float8_e4m3fn": "mxfp8", "float4_e2m1fn_x2": "mxfp4", "fp6_e3m2": "mxfp6"}
Record = Mapping[str, Any]


def detect(header: Header) -> Evidence | None:
    if "_weight_qdata" not in _keys.leaves(header):
        return None
    return Evidence(True, "weights are under ._weight_qdata, as torchao alone has them")


def read(header: Header) -> Reading:
    layers = {}
    for name, record in _records(header).items():
        if record["_type"] == "Tensor":
            if name not in header.entries:
                raise BadTensor(
                    header.path, name, f"the header's {NAMES} lists it and the file has no such tensor."
                )
            continue
        path, leaf = _keys.module(name), _keys.leaf(name)
        reader = TYPES.get(str(record["_type"]))
        if reader is None or leaf != "weight":
            raise BadTensor(
                header.path,
                name,
                f"torchao's {record['_type']} of a {leaf} is not read; what is: {', '.join(TYPES)} of a weight. "
                "Quantise with one of them, or convert the original bf16 file with `wan-runtime convert`.",
            )
        layers[path] = reader(header, path, record)
    return _keys.reading(header, layers)


def _records(header: Header) -> dict[str, Record]:
    """Tensor name -> its record; every one must be there and whole."""
    if NAMES not in header.metadata:
        raise CheckpointError(
            header.path,
            f"its keys are torchao's, and the header has lost torchao's metadata ({NAMES}), which says what kind each "
            "weight is and how its scales lie. Take the file as torchao saved it.",
        )
    records: dict[str, Record] = {}
    try:
        for name in json.loads(header.metadata[NAMES]):
            record = json.loads(header.metadata[name])
            data = record.get("_data", {})
            if not isinstance(record["_type"], str) or not isinstance(data, dict):
                raise TypeError(f"the record of {name!r} has no type")
            records[name] = record
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            header.path, f"torchao's metadata in the header is damaged ({error!r})."
        ) from error
    return records


def _key(path: str, part: str) -> str:
    return f"{path}._weight_{part}"


def _begin(
    header: Header, path: str, record: Record, optional: frozenset[str] = frozenset()
) -> tuple[str, str]:
    """Hold the tensors that are there against the record; the keys of the codes and of the scale."""
    listed = record.get("_tensor_data_names")
    parts = set(listed) if isinstance(listed, list) and all(isinstance(p, str) for p in listed) else set()
    here = {k.removeprefix(_key(path, "")) for k in header.entries if k.startswith(_key(path, ""))}
    if parts != here or not parts >= BESIDE or parts - BESIDE - optional:
        raise BadTensor(
            header.path,
            _key(path, "qdata"),
            f"its record lists {sorted(parts)} and the file has {sorted(here)}; a {record['_type']} is read with "
            f"{sorted(BESIDE)} and, where there are any, {sorted(optional)}.",
        )
    if len(header.entries[_key(path, "qdata")].shape) != 2:
        raise BadTensor(header.path, _key(path, "qdata"), "its codes are not a matrix.")
    return _key(path, "qdata"), _key(path, "scale")


def _optional(header: Header, path: str, part: str, source: Source) -> list[Source]:
    return [source] if _key(path, part) in header.entries else []


def _multiplied(header: Header, path: str, record: Record) -> Layer:
    """Float8Tensor and Int8Tensor: a float scale a block of `block_size`."""
    int8 = record["_type"] == "Int8Tensor"
    codes, scale = _begin(
        header,
        path,
        record,
        frozenset(("zero_point", "act_pre_scale", "act_quant_scale")) if int8 else frozenset(),
    )
    entry = header.entries[codes]
    out, inp = entry.shape
    kind = {"I8": "int8", **_keys.FP8}.get(entry.dtype)
    if kind is None or (kind == "int8") != int8 or header.entries[scale].dtype not in _keys.FLOAT:
        raise BadTensor(
            header.path,
            codes,
            f"a {record['_type']} has {'I8' if int8 else 'fp8'} codes and float scales; these are {entry.dtype} and "
            f"{header.entries[scale].dtype}.",
        )
    grid = _grid(header, scale, record, (out, inp))
    if grid not in ((1, 1), (out, 1)):
        kind += "_block"
    sources = [
        Source(codes, "payload", _keys.code_slot),
        Source(scale, "scale", lambda tensor, out, inp: tensor.float().reshape(grid)),
        *_optional(header, path, "zero_point", Source(_key(path, "zero_point"), "zero_point", _zero)),
        *_optional(
            header, path, "act_pre_scale", Source(_key(path, "act_pre_scale"), "pre_scale", _pre_scale)
        ),
        *_optional(
            header,
            path,
            "act_quant_scale",
            Source(_key(path, "act_quant_scale"), "input_scale", _keys.scalar_slot),
        ),
    ]
    return Layer(path, kind, (out, inp), tuple(sources), _without_zero_point)


def _grid(header: Header, scale: str, record: Record, shape: tuple[int, int]) -> tuple[int, int]:
    """How many scales along `out` and `in` the record's block size makes; the file must hold as many."""
    block, found = record.get("_data", {}).get("block_size"), header.entries[scale]
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        rows, cols = (-(-size // length) for size, length in zip(shape, block, strict=True))
        if found.numel == rows * cols and found.shape in ((rows, cols), (rows,), ()):
            return rows, cols
    raise BadTensor(
        header.path,
        scale,
        f"it has shape {list(found.shape)}, and the record says blocks of {block} in {list(shape)}.",
    )


def _zero(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    if bool(tensor.any()):
        raise ValueError("its zero points are not zero: asymmetric int8 is not read. Quantise symmetrically.")
    return tensor


def _without_zero_point(slots: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {name: tensor for name, tensor in slots.items() if name != "zero_point"}


def _pre_scale(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    if tensor.numel() not in (1, inp):
        raise ValueError(f"a scale an input channel has {inp} elements; this has shape {list(tensor.shape)}.")
    return tensor.float().reshape(1, -1).expand(1, inp).contiguous()


def _nvfp4(header: Header, path: str, record: Record) -> Layer:
    codes, scale = _begin(header, path, record, frozenset(("per_tensor_scale", "act_per_tensor_scale")))
    entry = header.entries[codes]
    _demand(header, scale, record, "block_size", 16)
    if entry.dtype != "U8" or header.entries[scale].dtype != "F8_E4M3":
        raise BadTensor(
            header.path, codes, f"an NVFP4Tensor has U8 codes and F8_E4M3 scales, not {entry.dtype}."
        )
    total = _key(path, "per_tensor_scale")
    one_level = Source(
        codes, "scale", lambda tensor, out, inp: torch.ones(1, 1, device="cpu")
    )  # by the type's own definition
    sources = (
        Source(codes, "payload", _keys.code_slot),
        Source(scale, "block_scale", _block_scale(header, scale, record, 16)),
        Source(total, "scale", _keys.scalar_slot) if total in header.entries else one_level,
        *_optional(
            header,
            path,
            "act_per_tensor_scale",
            Source(_key(path, "act_per_tensor_scale"), "input_scale", _keys.scalar_slot),
        ),
    )
    return Layer(path, "nvfp4", (entry.shape[0], entry.shape[1] * 2), sources)


def _mx(header: Header, path: str, record: Record) -> Layer:
    codes, scale = _begin(header, path, record)
    element = record.get("_data", {}).get("elem_dtype")
    name = element.get("_data") if isinstance(element, Mapping) else element
    kind, entry = ELEMENTS.get(str(name)), header.entries[codes]
    _demand(header, scale, record, "block_size", 32)
    if kind is None or entry.dtype != ("F8_E4M3" if kind == "mxfp8" else "U8"):
        raise BadTensor(
            header.path,
            codes,
            f"an MXTensor of {name} in {entry.dtype} is not read; what is: {', '.join(ELEMENTS)}.",
        )
    if header.entries[scale].dtype not in ("F8_E8M0", "U8"):
        raise BadTensor(
            header.path, scale, f"an MXTensor's scales are F8_E8M0; these are {header.entries[scale].dtype}."
        )
    shape = (entry.shape[0], entry.shape[1] * (2 if kind == "mxfp4" else 1))
    payload = Source(codes, "payload", _six_bits if kind == "mxfp6" else _keys.code_slot)
    return Layer(
        path, kind, shape, (payload, Source(scale, "block_scale", _block_scale(header, scale, record, 32)))
    )


def _six_bits(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """One 6-bit code a byte -> packed."""
    if bool((tensor > 63).any()):
        raise ValueError("its bytes are not 6-bit codes.")
    if inp % 4:
        raise ValueError(f"6-bit codes are packed by fours, and a row has {inp}.")
    return mxfp6.pack(tensor)


def _demand(header: Header, scale: str, record: Record, name: str, value: int) -> None:
    if record.get("_data", {}).get(name) != value:
        raise BadTensor(
            header.path, scale, f"its record says {name} {record.get('_data', {}).get(name)!r}, not {value}."
        )


def _block_scale(
    header: Header, scale: str, record: Record, block: int
) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    """The decoder that the record's layout flag asks for; a record without the flag is refused."""
    swizzled = record.get("_data", {}).get("is_swizzled_scales")
    if not isinstance(swizzled, bool):
        raise BadTensor(
            header.path,
            scale,
            f"its record's is_swizzled_scales is {swizzled!r}; the scales' order is not known.",
        )

    def decode(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
        if swizzled:  # a tile of 128 x 4 is stored as 32 x 16: the same bytes in the same order
            rows, cols = _swizzle.padded(out, inp // block)
            if tuple(tensor.shape) == (rows // 4, cols * 4):
                tensor = tensor.reshape(rows, cols)
            return _swizzle.unswizzle(tensor.view(torch.uint8), out, inp // block)
        if tuple(tensor.shape) != (out, inp // block):
            raise ValueError(
                f"plain block scales are [{out}, {inp // block}]; the file has {list(tensor.shape)}."
            )
        return tensor.view(torch.uint8)

    return decode


TYPES: Mapping[str, Callable[[Header, str, Record], Layer]] = {
    "Float8Tensor": _multiplied,
    "Int8Tensor": _multiplied,
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
}


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("torchao's files are read, not written")


DIALECT = Dialect(
    name="torchao",
    row="I1",
    meaning="torchao: a type a tensor in the header, even element in the low nibble",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=lambda layers: Marks(),
)
