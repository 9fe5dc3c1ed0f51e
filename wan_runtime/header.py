"""The header of a safetensors file: names, dtypes, shapes, byte ranges and metadata, read without the weights.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON, then the
data; each entry's `data_offsets` count from the end of the header. Every length is checked against the file's size
before any memory is spent on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wan_runtime.errors import BadTensor, CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 16
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLINGS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. `start` and `stop` are byte offsets in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors in file order, its metadata, and the config.json beside it if any."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def read_tensor(self, key: str) -> torch.Tensor:
        """Read one small tensor, a marker or a scale: the file's dtype and shape, on the CPU."""
        entry = self.entries[key]
        if entry.numel == 0:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        data = bytearray(entry.nbytes)
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            if file.readinto(data) != entry.nbytes:
                raise BadTensor(self.path, key, "the file became shorter while it was read.")
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file.

    Raises CheckpointError when the file is missing, is another format (pickle, GGUF), is cut short, or lies about
    its own layout; BadTensor when one entry does.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_file(path)
    if not path.is_file():
        raise CheckpointError(path, "there is no such file.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        _refuse_other_formats(path, start, size)
        length = int.from_bytes(start[:8], "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                path,
                f"the header claims {length} bytes and the file has {size}: it is cut short or is not a safetensors "
                "file. Download it again and compare its size or hash with the publisher's.",
            )
        text = start[8:] + file.read(length - 1)
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_without_repeats)
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
    return Header(path, ordered, metadata, _config_beside(path))


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(
            folder,
            f"the folder holds {len(files)} .safetensors files; name the one file to load (shards are not read).",
        )
    return files[0]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, JSON readers keep one without a word."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return fields


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    if size >= 10 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return  # a header of 640 bytes starts like a pickle
    if start[:4] == b"GGUF":
        raise CheckpointError(
            path, "this is a GGUF file, which is not read; use the safetensors release of the model."
        )
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise CheckpointError(
            path,
            "this is a pickle (.pt, .pth, .ckpt), which can run code when opened; only safetensors are read.",
        )
    if size < 10:
        raise CheckpointError(path, f"the file has {size} bytes: too short for a safetensors file.")


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
    if dtype not in DTYPES:
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
    want = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != want:
        raise BadTensor(path, key, f"{dtype}{shape} needs {want} bytes and has {end - begin}.")
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


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


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The config.json of a diffusers model folder, where the file lies in one."""
    file = path.parent / "config.json"
    if not file.is_file() or file.stat().st_size > 1_000_000:
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(
            file, f"this config.json beside the checkpoint is not valid JSON ({error})."
        ) from error
    return config if isinstance(config, dict) and "_class_name" in config else {}
