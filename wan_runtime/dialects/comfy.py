"""Comfy quantised tensors (B1, B2): a JSON record a layer says its format.

key                 dtype, shape                               meaning
X.comfy_quant       U8 [n]                                     UTF-8 JSON, {"format": "float8_e4m3fn" | "nvfp4" | ...}
X.weight            F8_E4M3 / F8_E5M2 [out, in]                FP8 codes
                    U8 [out, in / 2]                           NVFP4; the EVEN element in the HIGH nibble
X.weight_scale      F32 ()                                     FP8: W = code * weight_scale
                    F8_E4M3 [up128(out), up4(in / 16)]         NVFP4 block scales, SWIZZLED in 128 x 4 tiles
X.weight_scale_2    F32 ()                                     NVFP4: W = E2M1[code] * weight_scale * weight_scale_2
X.input_scale       F32 (), optional                           activation amax / 448 (FP8) or / 2688 (NVFP4)

The records may lie in the header instead, as `_quantization_metadata` = {"layers": {X: {"format": ...}}}, with or
without the file's prefix; a layer named there must exist. An unknown key in a record raises: a rotation that is not
undone is noise. Source: ComfyUI's QUANTIZATION.md and comfy-kitchen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys, _swizzle
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header
from wan_runtime.names import naming_of, without_prefix

HEADER_KEY = "_quantization_metadata"
NAMES = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "nvfp4": "nvfp4"}
# Also read: convert_to_quant's own name for one scale an output channel, and Model Optimizer's for e4m3.
FORMATS = {theirs: ours for ours, theirs in NAMES.items()} | {"float8_e4m3fn_rowwise": "fp8", "fp8": "fp8"}
# Keys of a record that leave the weight's value unchanged.
HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype"}
CHECKED = {"orig_shape", "group_size"}  # and these, where they agree with what is read
LARGEST_RECORD = 65_536


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if _keys.postprocessed(header):
        return None  # it may have ComfyUI's records, and never its nibbles
    if "comfy_quant" in names:
        return Evidence(True, "each quantised layer has a comfy_quant record")
    if HEADER_KEY in header.metadata:
        return Evidence(True, f"the header has {HEADER_KEY}")
    if "weight_scale_2" in names:
        return Evidence(False, _keys.UNMARKED)
    return None


def read(header: Header) -> Reading:
    records = _records(header)
    if not records:  # named by the caller: an NVFP4 file that lost its records
        records = {
            _keys.module(k): {"format": "nvfp4"} for k in header.entries if _keys.leaf(k) == "weight_scale_2"
        }
    layers = {path: _layer(header, path, record) for path, record in records.items()}
    markers = tuple(key for key in header.entries if _keys.leaf(key) == "comfy_quant")
    _refuse_unmarked(header, layers)
    return _keys.reading(header, layers, markers)


def _records(header: Header) -> dict[str, dict[str, Any]]:
    """Module path as spelled in the file -> its record, from the per-layer tensors and from the header."""
    records = _header_records(header)
    for key in header.entries:
        if _keys.leaf(key) == "comfy_quant":
            path, record = _keys.module(key), _parse(header, key, _record_text(header, key))
            other = records.get(path, record).get("format")
            if other != record.get("format"):
                raise BadTensor(
                    header.path,
                    key,
                    f"it says format {record.get('format')!r}, and the header's {HEADER_KEY} says {other!r}.",
                )
            records[path] = record
    return records


def _header_records(header: Header) -> dict[str, dict[str, Any]]:
    text = header.metadata.get(HEADER_KEY)
    if text is None:
        return {}
    layers = _parse(header, HEADER_KEY, text).get("layers", {})
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(header.path, f"the header's {HEADER_KEY} names no layers.")
    records: dict[str, dict[str, Any]] = {}
    _, prefix = naming_of(header.path, header.entries)
    for name, value in layers.items():
        record = {"format": value} if isinstance(value, str) else value
        path = _module_named(header, name, prefix)
        if not isinstance(record, dict) or path in records:
            problem = "twice" if path in records else f"with {str(value)[:80]!r}, which is no record"
            raise CheckpointError(header.path, f"{HEADER_KEY} names the layer {name!r} {problem}.")
        records[path] = record
    return records


def _record_text(header: Header, key: str) -> str:
    entry = header.entries[key]
    if entry.dtype != "U8" or entry.numel > LARGEST_RECORD:
        raise BadTensor(
            header.path, key, f"a comfy_quant record is U8 text; this is {entry.dtype} {list(entry.shape)}."
        )
    try:
        return bytes(header.read_tensor(key).tolist()).decode()
    except UnicodeDecodeError as error:
        raise BadTensor(header.path, key, f"the record is not UTF-8 ({error}).") from error


def _parse(header: Header, key: str, text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTensor(header.path, key, f"the record {text[:80]!r} is not valid JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise BadTensor(header.path, key, f"the record {text[:80]!r} is not a JSON object.")
    return fields


def _module_named(header: Header, name: str, prefix: str) -> str:
    """The module that a header record names; third-party files leave out the file's prefix, or add one."""
    bare = without_prefix(name)
    found = {path for path in (name, bare, prefix + bare) if f"{path}.weight" in header.entries}
    if len(found) != 1:
        raise CheckpointError(
            header.path,
            f"{HEADER_KEY} names the layer {name!r}, and {len(found)} weights of the file match it.",
        )
    return found.pop()


def _layer(header: Header, path: str, record: Mapping[str, Any]) -> Layer:
    key = f"{path}.weight"
    if key not in header.entries:
        raise BadTensor(header.path, f"{path}.comfy_quant", "its layer has no weight in the file.")
    fields = dict(record)
    if isinstance(fields.get("params"), dict):  # as convert_to_quant's older versions nest them
        fields |= fields.pop("params")
    unknown = sorted(fields.keys() - HARMLESS - CHECKED)
    if unknown:
        raise BadTensor(
            header.path,
            key,
            f"its record asks for {', '.join(unknown)}, which is not understood; ignoring it is noise.",
        )
    weight_format = FORMATS.get(str(fields.get("format")))
    if weight_format is None:
        raise BadTensor(
            header.path,
            key,
            f"its record says format {fields.get('format')!r}; this dialect reads {', '.join(FORMATS)}.",
        )
    if weight_format == "nvfp4":
        payload = Source(key, "payload", _swap_nibbles)
        block_scale = Source(f"{path}.weight_scale", "block_scale", _unswizzle)
        layer = _keys.nvfp4_layer(header, path, payload, block_scale)
        return _as_recorded(header, layer, fields)
    entry = header.entries[key]
    # The real dtype decides between e4m3 and e5m2, not the record; codes stored as bytes have the record alone.
    if entry.dtype not in (*_keys.FP8, "U8") or len(entry.shape) != 2:
        raise BadTensor(
            header.path,
            key,
            f"its record says {fields['format']} and it is {entry.dtype} {list(entry.shape)}.",
        )
    layer = _keys.fp8_layer(header, path, "weight_scale", "input_scale", weight_format)
    return _as_recorded(header, layer, fields)


def _as_recorded(header: Header, layer: Layer, record: Mapping[str, Any]) -> Layer:
    """Hold the layer against what its record says of it: a padded weight or other blocks would be misread."""
    real = {"orig_shape": list(layer.shape), "group_size": 16 if layer.format == "nvfp4" else None}
    for name in CHECKED & record.keys():
        if record[name] not in (None, real[name]):
            raise BadTensor(
                header.path,
                f"{layer.module}.weight",
                f"its record says {name} {record[name]!r}, and this reading has {real[name]!r}.",
            )
    return layer


def _refuse_unmarked(header: Header, layers: Mapping[str, Layer]) -> None:
    """A layer without a record is loaded as it is by Comfy: an fp8 or packed one would then be noise."""
    for key, entry in header.entries.items():
        if (
            _keys.is_linear_weight(key, entry)
            and _keys.module(key) not in layers
            and entry.dtype in (*_keys.FP8, "U8")
        ):
            raise BadTensor(
                header.path,
                key,
                f"it is {entry.dtype} and has no comfy_quant record while {len(layers)} layers have.",
            )


def _swap_nibbles(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return (tensor >> 4) | ((tensor & 0xF) << 4)


def _unswizzle(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return _swizzle.unswizzle(tensor.view(torch.uint8), out, inp // 16)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    record = json.dumps({"format": NAMES[weight_format]}).encode()
    encoded = _keys.encode(weight_format, slots)
    if weight_format == "nvfp4":
        encoded["weight"] = _swap_nibbles(slots["payload"], 0, 0)
        encoded["weight_scale"] = _swizzle.swizzle(slots["block_scale"]).view(torch.float8_e4m3fn)
    return {"comfy_quant": torch.tensor(list(record), dtype=torch.uint8), **encoded}


def marks(layers: Mapping[str, str]) -> Marks:
    return Marks(
        layout={"nibble": "even high", "block scales": "swizzled"} if "nvfp4" in layers.values() else {}
    )


DIALECT = Dialect(
    name="comfy",
    row="B1, B2",
    meaning="ComfyUI: NVFP4 with the even element in the high nibble and swizzled block scales",
    detect=detect,
    read=read,
    targets={"comfy-fp8": "fp8", "comfy-nvfp4": "nvfp4"},
    encode=encode,
    marks=marks,
)
