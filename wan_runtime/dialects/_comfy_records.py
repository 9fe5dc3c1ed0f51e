"""ComfyUI's records: JSON that says how one layer is quantised, beside the layer or in the file's header.

X.comfy_quant            U8 [n], UTF-8 JSON: {"format": "nvfp4", ...}
_quantization_metadata   header metadata: {"layers": {X: {"format": "nvfp4", ...}}}, X with or without the file's prefix

A value in the header may be the bare name of the format, and older versions of convert_to_quant nest what belongs to a
record under "params".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from wan_runtime.dialects import _keys
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header
from wan_runtime.names import naming_of, without_prefix

HEADER_KEY = "_quantization_metadata"
TENSOR = "comfy_quant"
LARGEST_RECORD = 65_536
# What leaves the weight's value unchanged, so that one of two records may leave it out.
HARMLESS = {"full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_row", "group_size", "linear_dtype"}

Record = Mapping[str, Any]


def records(header: Header) -> dict[str, Record]:
    """Module path as spelled in the file -> its record, of both carriers.

    Raises CheckpointError for a record that cannot be read, names no layer, or disagrees with the other carrier's.
    """
    found = _in_header(header)
    for key in header.entries:
        if _keys.leaf(key) != TENSOR:
            continue
        path, record = _keys.module(key), _flat(_parse(header, key, _text(header, key)))
        if path in found:
            _refuse_disagreement(header, key, record, found[path])
        found[path] = record
    return found


def _refuse_disagreement(header: Header, key: str, record: Record, other: Record) -> None:
    """The header's record must say the same of everything that both name, and of everything that changes a value."""
    for name in record.keys() | other.keys():
        both = name in record and name in other
        if (both or name not in HARMLESS) and record.get(name) != other.get(name):
            raise BadTensor(
                header.path,
                key,
                f"it says {name} {record.get(name)!r}, and the header's {HEADER_KEY} says {other.get(name)!r}.",
            )


def _in_header(header: Header) -> dict[str, Record]:
    text = header.metadata.get(HEADER_KEY)
    if text is None:
        return {}
    layers = _parse(header, HEADER_KEY, text).get("layers", {})
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(header.path, f"the header's {HEADER_KEY} names no layers.")
    found: dict[str, Record] = {}
    _, prefix = naming_of(header.path, header.entries)
    for name, value in layers.items():
        record = {"format": value} if isinstance(value, str) else value
        path = _module_named(header, name, prefix)
        if not isinstance(record, dict) or path in found:
            problem = "twice" if path in found else f"with {str(value)[:80]!r}, which is no record"
            raise CheckpointError(header.path, f"{HEADER_KEY} names the layer {name!r} {problem}.")
        found[path] = _flat(record)
    return found


def _flat(record: dict[str, Any]) -> Record:
    nested = record.get("params")
    if not isinstance(nested, dict):
        return record
    return {**nested, **{name: value for name, value in record.items() if name != "params"}}


def _text(header: Header, key: str) -> str:
    entry = header.entries[key]
    if entry.dtype != "U8" or entry.numel > LARGEST_RECORD:
        raise BadTensor(
            header.path, key, f"a comfy_quant record is U8 text; this is {entry.dtype} {list(entry.shape)}."
        )
    try:
        return header.read_bytes(key).decode()
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
