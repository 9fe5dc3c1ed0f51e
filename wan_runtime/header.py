"""What a checkpoint holds, whatever it is on disk: names, dtypes, shapes, byte ranges and metadata; no weights.

wan_runtime/containers reads these records from each kind of file or folder; dialects and everything above them see only
a `Header`, and never ask how many files there are.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wan_runtime.errors import BadTensor, CheckpointError

NAMES: Mapping[str, tuple[str, int]] = {  # a file's dtype -> torch's name for it, and its bytes
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
SIZES: Mapping[str, int] = {name: size for name, (_, size) in NAMES.items()}


class _Dtypes(Mapping[str, "torch.dtype"]):
    """A file's dtype -> torch's, looked up when it is asked for: reading a header alone needs no torch."""

    def __getitem__(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, NAMES[name][0])
        return dtype

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


class _Spellings(Mapping["torch.dtype", str]):
    """The reverse: torch's dtype -> a file's."""

    def __getitem__(self, dtype: torch.dtype) -> str:
        return _BY_TORCH_NAME[str(dtype)]

    def __iter__(self) -> Iterator[torch.dtype]:
        return iter(DTYPES.values())

    def __len__(self) -> int:
        return len(NAMES)


_BY_TORCH_NAME = {f"torch.{known}": name for name, (known, _) in NAMES.items()}
DTYPES: Mapping[str, torch.dtype] = _Dtypes()
SPELLINGS: Mapping[torch.dtype, str] = _Spellings()
Read = Callable[[str], "torch.Tensor"]  # key -> its tensor: the file's dtype and shape, on the CPU


@dataclass(frozen=True)
class Entry:
    """One tensor: its bytes are `start` to `stop` of `file`, in row-major order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: Path

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself.

    path       what errors and reports call it; opening `path` again finds the same checkpoint.
    entries    its tensors in the order of the files and of the bytes in each.
    files      every file with tensors in it -> its size in bytes.
    metadata   the files' own metadata, of all files together.
    config     the config.json of the diffusers model folder that it lies in, where it does.
    container  the name of the container it was read from.
    notes      what the reader should be told of the choice of these files.
    mapped     tensors that a container could only get from a library of its format, which has them memory-mapped; empty
               where the bytes lie in the files as `entries` says.
    """

    path: Path
    entries: Mapping[str, Entry]
    files: Mapping[Path, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    container: str = "safetensors"
    notes: tuple[str, ...] = ()
    mapped: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """The size of all files together."""
        return sum(self.files.values())

    def read_tensor(self, key: str) -> torch.Tensor:
        """Read one tensor into memory of its own: the file's dtype and shape, on the CPU."""
        if self.mapped:
            return self.mapped[key].clone()
        entry = self.entries[key]
        if entry.numel == 0:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
        return torch.frombuffer(self._read(key), dtype=DTYPES[entry.dtype]).reshape(entry.shape)

    def read_bytes(self, key: str) -> bytes:
        """One tensor's bytes as they lie in the file."""
        if self.mapped:
            return bytes(self.mapped[key].contiguous().flatten().view(torch.uint8).tolist())
        return bytes(self._read(key))

    def _read(self, key: str) -> bytearray:
        entry = self.entries[key]
        data = bytearray(entry.nbytes)
        try:
            with open(entry.file, "rb") as file:
                file.seek(entry.start)
                read = file.readinto(data)
        except OSError as error:
            raise CheckpointError(entry.file, f"it cannot be read any more ({error}).") from error
        if read != entry.nbytes:
            raise BadTensor(entry.file, key, "the file became shorter while it was read.")
        return data

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """A reader of every tensor in turn, from memory-mapped files: one file is mapped at a time, as `entries` is in
        the order of the files. A tensor keeps the mapping it lies in."""
        if self.mapped:
            yield self.mapped.__getitem__
            return
        current: dict[Path, mmap.mmap] = {}

        def read(key: str) -> torch.Tensor:
            entry = self.entries[key]
            if entry.numel == 0:
                return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
            if entry.file not in current:
                current.clear()
                current[entry.file] = _mapped(entry.file, self.files[entry.file])
            return _view(current[entry.file], entry)

        yield read
        current.clear()


def _mapped(path: Path, size: int) -> mmap.mmap:
    """The file in memory, privately: nothing written to a tensor reaches it."""
    try:
        with open(path, "rb") as file:
            check_size(path, file.seek(0, 2), size)  # reading past a mapped file's end would kill the process
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(path, f"it cannot be memory-mapped ({error}).") from error


def _view(data: mmap.mmap, entry: Entry) -> torch.Tensor:
    """A tensor's bytes in place, or a copy of them where they are not aligned for its dtype."""
    raw = torch.frombuffer(data, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
    return typed(raw if entry.start % DTYPES[entry.dtype].itemsize == 0 else raw.clone(), entry)


def typed(raw: torch.Tensor, entry: Entry) -> torch.Tensor:
    """A tensor's bytes, uint8 [nbytes] and aligned for its dtype, as the tensor."""
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def check_size(path: Path, found: int, size: int) -> None:
    """Raise CheckpointError where a file has not the size that it had when its header was read."""
    if found != size:
        raise CheckpointError(
            path, f"it had {size} bytes when it was opened and has {found} now; is it still being written?"
        )
