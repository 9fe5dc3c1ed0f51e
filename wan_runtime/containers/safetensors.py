"""One safetensors file; the name tells nothing, so this is also what an unknown file is refused as.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON, then the
data; each entry's `data_offsets` count from the end of the header. Every length is checked against the file's size
before any memory is spent on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_runtime.containers import Container, Found
from wan_runtime.containers._folders import config_in
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import SIZES, Entry, Header

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 16


def _find(path: Path) -> Sequence[Found]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [Found("safetensors", file, (file,)) for file in files]


def _read(found: Found) -> Header:
    return read_file(found.path)


def read_file(path: Path) -> Header:
    """Read and check the header of one safetensors file; config is that of the folder it lies in.

    Raises CheckpointError when the file is another format, is cut short, or lies about its own layout; BadTensor when
    one entry does.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        if size < 10:
            raise CheckpointError(path, f"the file has {size} bytes: too short for a safetensors file.")
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                path,
                f"the header claims {length} bytes and the file has {size}: it is cut short or is not a safetensors "
                "file. Download it again and compare its size or hash with the publisher's.",
            )
        text = start[8:] + file.read(length - 1)
    try:
        fields = json.loads(text.decode(), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            path, f"the header is not valid JSON ({error}); the file is damaged."
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(path, "the header is not a JSON object; the file is damaged.")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(path, "__metadata__ must map strings to strings; the file is damaged.")
    entries = {key: _entry(path, key, value, 8 + length, size) for key, value in fields.items()}
    _check_coverage(path, entries, 8 + length, size)
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].start))
    return Header(path, ordered, {path: size}, metadata, config_in(path.parent))


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, JSON readers keep one without a word."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return fields


def looks_like_safetensors(path: Path) -> bool:
    """Whether the first bytes are a header length that the file has room for and the start of a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _entry(path: Path, key: str, value: object, data_start: int, size: int) -> Entry:
    match value:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
            **others,
        } if not others:
            pass
        case _:
            raise BadTensor(path, key, f"its header entry is malformed: {str(value)[:120]}.")
    if dtype not in SIZES:
        raise BadTensor(path, key, f"dtype {dtype!r} is not known.")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= size for n in shape):
        raise BadTensor(
            path, key, f"its shape {str(shape)[:80]} is not one of a tensor in a file of {size} bytes."
        )
    if not 0 <= begin <= end or data_start + end > size:
        raise BadTensor(
            path,
            key,
            f"it ends at byte {data_start + end} and the file has {size}: the file is cut short. Download it again.",
        )
    want = math.prod(shape) * SIZES[dtype]
    if end - begin != want:
        raise BadTensor(path, key, f"{dtype}{shape} needs {want} bytes and has {end - begin}.")
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end, path)


def _check_coverage(path: Path, entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    """The tensors must tile the data exactly: an overlap or a gap means that names and bytes no longer match."""
    at = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise BadTensor(
                path, key, f"it starts at byte {entry.start}, not at {at}: the header does not tile the file."
            )
        at = entry.stop
    if at != size:
        raise CheckpointError(
            path, f"{size - at} bytes follow the last tensor; the header does not cover the file."
        )


CONTAINER = Container("safetensors", "one file", _find, _read)
