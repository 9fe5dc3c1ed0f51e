"""Writes a safetensors file a tensor at a time, without ever holding two, and so that nobody sees half of it.

The header comes first in the file and says where every tensor lies, so all shapes and dtypes are known before the
first byte is written. Tensors lie in the order of the safetensors library (widest dtype first, then by name), which
keeps every one aligned; they may be handed over in any order, as each goes to its own place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_runtime.aside import written_aside
from wan_runtime.errors import CheckpointError, InvalidOption, UnaccountedTensors
from wan_runtime.header import SPELLINGS

ALIGNMENT = 8  # the header is padded with spaces to a multiple of this


@dataclass(frozen=True)
class Spec:
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def spec_of(tensor: torch.Tensor) -> Spec:
    """The spec of a tensor, which may be on the meta device."""
    return Spec(tensor.dtype, tuple(tensor.shape))


Write = Callable[[str, torch.Tensor], None]


@contextlib.contextmanager
def new_safetensors(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, sources: Iterable[Path] = ()
) -> Iterator[Write]:
    """A context whose value writes one tensor: `write(key, tensor)`, once for every key of `specs`.

    The file is made beside `path` and renamed onto it, flushed to the disk, when the context ends without an error and
    every tensor was written; otherwise nothing is left and an older file at `path` stays as it was.

    Raises InvalidOption when `path` cannot be a checkpoint's name or is a file being read (`sources`),
    CheckpointError when the disk has no room, UnaccountedTensors when a tensor was not written.
    """
    check_place(path, sources)
    head, places = _laid_out(specs, metadata)
    size = len(head) + sum(spec.nbytes for spec in specs.values())
    _require_room(path, size)
    missing = dict(specs)
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(head)

        def write(key: str, tensor: torch.Tensor) -> None:
            expected = missing.pop(key)
            if spec_of(tensor) != expected:
                raise AssertionError(f"{key} was announced as {expected} and is {spec_of(tensor)}.")
            file.seek(len(head) + places[key])
            file.write(_bytes(tensor))

        yield write
        if missing:
            raise UnaccountedTensors(path, unfilled=sorted(missing), hint="Nothing was written.")
        file.truncate(size)  # tensors without elements at the end write nothing


def check_place(path: Path, sources: Iterable[Path]) -> None:
    """Raise InvalidOption unless a new checkpoint may be written to `path`; `sources` are the files being read."""
    if path.suffix != ".safetensors":
        raise InvalidOption(f"{path}: the new file's name must end in .safetensors; hosts find files by it.")
    if path.is_dir():
        raise InvalidOption(f"{path} is a folder; give the new file's name.")
    if not path.parent.is_dir():
        raise InvalidOption(f"{path}: there is no folder {path.parent}; make it first.")
    if path.exists() and any(os.path.samefile(path, source) for source in sources):
        raise InvalidOption(f"{path} is being read; give the new file another name, then delete the old.")


def _laid_out(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and where each tensor begins after it."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    places, at = {}, 0
    for key, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        places[key] = at
        fields[key] = {
            "dtype": SPELLINGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _require_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(
            path,
            f"the new file takes {size / 2**30:.2f} GiB and {path.parent} has {free / 2**30:.2f} GiB free. "
            "Nothing was written.",
        )
