"""A checkpoint's tensors as runs of bytes to read: which bytes of which file belong to which tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.header import Entry


@dataclass(frozen=True)
class Part:
    """`size` bytes of a span: `at` bytes from its start, and `offset` bytes from the start of the tensor of `key`."""

    key: str
    at: int
    offset: int
    size: int


@dataclass(frozen=True)
class Span:
    """`size` bytes of a file from byte `start` on, all of which belong to tensors."""

    file: Path
    start: int
    size: int
    parts: tuple[Part, ...]


def spans(entries: Mapping[str, Entry], keys: Iterable[str], limit: int) -> Iterator[Span]:
    """The bytes of `keys`, in that order, in spans of at most `limit` bytes.

    Neighbours in a file share a span, and a tensor larger than one lies in several: the part that ends it comes last.
    A tensor without elements has one part, of no bytes.
    """
    parts: list[Part] = []
    file, start, stop = Path(), 0, 0
    for key in keys:
        entry = entries[key]
        if (entry.file, entry.start) != (file, stop):
            if parts:
                yield Span(file, start, stop - start, tuple(parts))
            parts, file, start, stop = [], entry.file, entry.start, entry.start
        while True:
            size = min(entry.stop - stop, start + limit - stop)
            parts.append(Part(key, stop - start, stop - entry.start, size))
            stop += size
            if stop - start == limit:
                yield Span(file, start, limit, tuple(parts))
                parts, start = [], stop
            if stop == entry.stop:
                break
    if parts:
        yield Span(file, start, stop - start, tuple(parts))
