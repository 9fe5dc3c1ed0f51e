"""A GGUF file, through the `gguf` package: `pip install 'wan-runtime[gguf]'`.

Floats become entries of their own dtype. A tensor in ggml's blocks is an entry "U8" [rows, bytes a row], and metadata
"gguf" says what it is: JSON {"architecture": ..., "tensors": {key: {"type": "Q4_K", "shape": [out, in]}}}. The shape is
the dimensions turned round (GGUF's first is the fastest), or that of the field `comfy.gguf.orig_shape.<key>`, which
converters write for a tensor that they had to flatten, such as the patch embedding's five dimensions.
Source: the GGUF specification in the ggml repository; ComfyUI-GGUF, loader.py.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_runtime.containers import Container, Found
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import SIZES, Entry, Header

MAGIC = b"GGUF"
METADATA = "gguf"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
ALIGNMENT = 32  # of tensors, where the file does not say
MOST_VALUES = 3_000_000  # in the fields; a tokeniser has a million


def _find(path: Path) -> Sequence[Found]:
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    return [Found("gguf", file, (file,)) for file in files if _starts_right(file)]


def _starts_right(file: Path) -> bool:
    try:
        with open(file, "rb") as opened:
            return opened.read(4) == MAGIC
    except OSError as error:
        raise CheckpointError(file, f"it cannot be read ({error}).") from error


def _read(found: Found) -> Header:
    path = found.path
    try:
        library = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            path, f"reading GGUF needs the gguf package ({error}): pip install 'wan-runtime[gguf]'."
        ) from error
    try:
        reader = _reader(library, path)
        architecture = str(_field(reader, "general.architecture") or "not named")
        read = [_tensor(reader, tensor, path) for tensor in reader.tensors]
    except (ValueError, LookupError, OverflowError, TypeError, RecursionError, AttributeError) as error:
        raise CheckpointError(path, f"the GGUF file is damaged or cut short ({error!r:.200}).") from error
    entries = {key: entry for key, entry, _, _ in sorted(read, key=lambda item: item[1].start)}
    size = path.stat().st_size
    _check_coverage(path, entries, size, reader)
    blocks = {key: {"type": kind, "shape": shape} for key, _, kind, shape in read if kind not in FLOATS}
    metadata = {METADATA: json.dumps({"architecture": architecture, "tensors": blocks})}
    return Header(path, entries, {path: size}, metadata)


def _reader(library: Any, path: Path) -> Any:
    """The package's reader, which trusts every length in a file, made to refuse those that the file has no room for."""

    class Bounded(library.GGUFReader):  # type: ignore[misc]
        values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.values += 1
            if self.values > MOST_VALUES:
                raise ValueError(f"its fields hold more than {MOST_VALUES} values")
            if not 0 <= count <= len(self.data):
                raise ValueError(f"a field claims {count} values")
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError(f"it ends at byte {len(self.data)}, within what lies at {offset}")
            return found

    reader = Bounded(path)
    if reader.byte_order != "I":
        raise ValueError("its bytes are in the other order")
    return reader


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


FLOATS = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "F64": "F64",
    "I8": "I8",
    "I16": "I16",
    "I32": "I32",
    "I64": "I64",
}


def _tensor(reader: Any, tensor: Any, path: Path) -> tuple[str, Entry, str, list[int]]:
    """(key, entry, ggml type, logical shape) of one tensor."""
    key, kind = str(tensor.name), str(tensor.tensor_type.name)
    stored = [int(n) for n in reversed(tensor.shape.tolist())]
    original = _field(reader, ORIGINAL_SHAPE + key)
    shape = stored if original is None else [int(n) for n in original]
    start, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
    if math.prod(shape) != math.prod(stored) or math.prod(stored) != int(tensor.n_elements) or not shape:
        raise BadTensor(path, key, f"its shape {shape} is not that of its {tensor.n_elements} stored values.")
    if kind in FLOATS:
        dtype, held = FLOATS[kind], tuple(shape)
        if math.prod(shape) * SIZES[dtype] != nbytes:
            raise BadTensor(path, key, f"{kind} {shape} does not take {nbytes} bytes.")
    else:
        rows = math.prod(shape[:-1])
        if rows == 0 or nbytes % rows:
            raise BadTensor(
                path, key, f"the blocks of its {nbytes} bytes do not end with its rows of {shape[-1]}."
            )
        dtype, held = "U8", (rows, nbytes // rows)
    return key, Entry(dtype, held, start, start + nbytes, path), kind, shape


def _check_coverage(path: Path, entries: dict[str, Entry], size: int, reader: Any) -> None:
    """Each tensor starts at the next multiple of the alignment, as ggml demands, and the last ends with the file."""
    alignment = int(_field(reader, "general.alignment") or ALIGNMENT)
    at = int(reader.data_offset)
    for key, entry in entries.items():
        if entry.start != -(-at // alignment) * alignment:
            raise BadTensor(
                path,
                key,
                f"it starts at byte {entry.start}; what is before it ends at {at}, with an alignment of {alignment}.",
            )
        at = entry.stop
    if not entries or not 0 <= size - at < alignment:
        raise CheckpointError(path, f"its last tensor ends at byte {at}, and the file has {size} bytes.")


CONTAINER = Container("gguf", "a GGUF file", _find, _read)
