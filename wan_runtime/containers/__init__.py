"""What a checkpoint is on disk: one file a kind of container, each giving the same `Header`.

A container file holds `CONTAINER = Container(name, holds, find, read)` and nothing outside names it:

    find(path)     is asked twice over: with a folder, for every checkpoint of its kind in it, and with a file, for the
                   checkpoint that the file is or is part of. It looks at names and the first bytes only, and gives a
                   `Found` for each. Of two finds, the one whose files the other has too is dropped (a shard is no
                   checkpoint beside its set); what then is left twice is refused as ambiguous.
    read(found)    gives the `Header`: `entries` with dtype, shape, file and byte range of every tensor. Shapes and
                   ranges are checked against the size of the file they are in, so that a lie costs no memory. Tensors
                   in blocks of a format's own (GGUF) are entries of dtype "U8" whose shape is [rows, bytes a row]; what
                   the bytes mean goes into `metadata` for a dialect to read. Only where a library of the format must
                   map the tensors itself are they given as `mapped`.

Nothing above this package knows how many files there are, nor where.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.catalogue import Catalogue
from wan_runtime.containers._folders import empty_folder, transformer_in
from wan_runtime.errors import CheckpointError, shown
from wan_runtime.header import Header

FALLBACK = "safetensors"  # what a file is taken for, and refused as, when no other container knows it


@dataclass(frozen=True)
class Found:
    """A checkpoint found on the disk and not read yet.

    container  which container finds and reads it.
    path       what to call it; found again under this name.
    files      all of its files, an index included; those that are missing too, where names tell.
    """

    container: str
    path: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Container:
    """One kind of checkpoint on disk.

    holds   what it is, in a few words.
    find    folder -> the checkpoints of this kind in it; file -> the one it belongs to, or none.
    read    Found -> Header; raises CheckpointError when files are missing, damaged or contradict each other.
    pickle  whether reading it means unpickling: only for callers that say they want that.
    """

    name: str
    holds: str
    find: Callable[[Path], Sequence[Found]]
    read: Callable[[Found], Header]
    pickle: bool = False


CONTAINERS: Catalogue[Container] = Catalogue("wan_runtime.containers", Container)


def locate(path: Path | str) -> tuple[Found, tuple[str, ...]]:
    """The one checkpoint that a file or folder is, and what to tell of the choice; nothing but names is read.

    Raises CheckpointError when there is none, or more than one.
    """
    with _readable(Path(path)):
        return _locate(Path(path))


def _locate(path: Path) -> tuple[Found, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if path.is_dir():
        path, notes = transformer_in(path)
    elif not path.is_file():
        raise CheckpointError(path, _absent(path))
    finds = [found for name in CONTAINERS for found in CONTAINERS[name].find(path)]
    if path.is_file() and len(finds) > 1:
        finds = [found for found in finds if found.container != FALLBACK]
    finds = _largest(finds)
    if not finds:
        raise CheckpointError(path, empty_folder(path))
    if len(finds) > 1:
        raise CheckpointError(
            path,
            f"{'the folder holds' if path.is_dir() else 'the file belongs to'} {len(finds)} checkpoints: "
            + shown([f"{f.path.name} ({CONTAINERS[f.container].holds})" for f in finds])
            + ". Name the one to load.",
        )
    return finds[0], notes


def read_header(path: Path | str, *, pickle: bool = False) -> Header:
    """Read and check what a file or folder holds, without its weights.

    Args:
        path: a .safetensors file; the folder, the index or any one file of a checkpoint in several; a diffusers model
            or pipeline folder.
        pickle: whether a .pth file may be unpickled (tensors only, no code).

    Raises CheckpointError when there is no such checkpoint, files of it are missing, or it is cut short, of a kind that
    is not read, or lies about its layout; BadTensor when one entry does.
    """
    found, notes = locate(path)
    container = CONTAINERS[found.container]
    if container.pickle and not pickle:
        raise CheckpointError(
            found.path,
            "this is a pickle (.pt, .pth, .ckpt), which can run code when opened; only safetensors are read here. "
            f"`wan-runtime convert {found.path.name} {found.path.stem}.safetensors --to ...` takes the tensors out "
            "of it without running any.",
        )
    with _readable(found.path):
        header = container.read(found)
    return dataclasses.replace(header, container=container.name, notes=(*notes, *header.notes))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the operating system refuses, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(error.filename or path, f"it cannot be read ({error.strerror}).") from error


def _absent(path: Path) -> str:
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, where there is nothing to read."
    return "it is neither a file nor a folder." if path.exists() else "there is no such file."


def _largest(finds: Sequence[Found]) -> list[Found]:
    """The finds whose files no other find has all of; of two with the same files, the first."""
    kept: list[Found] = []
    for found in sorted(finds, key=lambda f: -len(f.files)):
        if not any(set(found.files) <= set(other.files) for other in kept):
            kept.append(found)
    return kept
