"""A checkpoint's tensors onto a device, in turn: memory-mapped, or to a GPU read by threads through pinned memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_runtime.ahead import ahead
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header, check_size, typed
from wan_runtime.ring import Copy, GpuLane, Lane, Ring
from wan_runtime.spans import Span, spans

THREADS = 8  # that read; more gain nothing from a disk, and lose from the page cache
SPAN = 16 * 2**20
SENT = 4  # buffers of SPAN bytes that are not read into: one that is taken for the next, and some that are copied from


def tensors_on(
    header: Header, keys: Iterable[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, its tensor on the device, in the file's dtype and shape) for each key, in the order given.

    On the CPU a tensor is a view of the mapped file, and takes no memory of its own. To a CUDA device at most
    THREADS * SPAN bytes are on the way. Raises CheckpointError when a file changed since its header was read.
    """
    if device.type == "cuda" and not header.mapped and hasattr(os, "preadv"):
        yield from uploaded(header, keys, GpuLane(device))
        return
    with header.opened() as read:
        for key in keys:
            yield key, read(key).to(device)


@dataclass(frozen=True)
class _Job:
    """A span, the file it is read from, and the buffer that it is read into."""

    span: Span
    descriptor: int
    buffer: torch.Tensor


def uploaded(
    header: Header, keys: Iterable[str], lane: Lane, *, threads: int = THREADS, span: int = SPAN
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `tensors_on`, by way of a lane.

    Threads do nothing but read: each step of Python's that they took would stop the caller's, who queues the copies and
    computes on what has arrived.
    """
    ring = Ring(lane, threads + SENT, span)
    rooms: dict[str, torch.Tensor] = {}  # of tensors that are on the way
    with contextlib.ExitStack() as stack:
        stack.callback(lane.drain)  # a consumer that stops early must not free what is still being written
        files = stack.enter_context(_Files(header.files))
        jobs = (
            _Job(found, files.opened(found.file), ring.take()) for found in spans(header.entries, keys, span)
        )
        read = ahead(jobs, _filled, lambda job: 1, threads=threads, budget=threads)
        for job in stack.enter_context(contextlib.closing(read)):
            files.close_before(job.span.file)
            for part in job.span.parts:
                if part.key not in rooms:
                    rooms[part.key] = lane.room(header.entries[part.key].nbytes)
            fence = lane.send(_copies(job, rooms))
            ring.give(job.buffer, fence)
            lane.arrive(fence)
            for part in job.span.parts:
                entry = header.entries[part.key]
                if part.offset + part.size == entry.nbytes:
                    yield part.key, typed(rooms.pop(part.key), entry)


def _filled(job: _Job) -> _Job:
    """Read a span's bytes into the start of its buffer."""
    span = job.span
    bytes_ = job.buffer.numpy().data
    read = 0
    while read < span.size:
        try:
            count = os.preadv(job.descriptor, [bytes_[read : span.size]], span.start + read)
        except OSError as error:
            raise CheckpointError(span.file, f"it cannot be read any more ({error}).") from error
        if count == 0:
            key = next(part.key for part in span.parts if part.at + part.size > read)
            raise BadTensor(span.file, key, "the file became shorter while it was read.")
        read += count
    return job


def _copies(job: _Job, rooms: Mapping[str, torch.Tensor]) -> Iterator[Copy]:
    for part in job.span.parts:
        if part.size:
            yield (
                rooms[part.key][part.offset : part.offset + part.size],
                job.buffer[part.at : part.at + part.size],
            )


class _Files:
    """The files that are being read, each as it was when its header was."""

    def __init__(self, sizes: Mapping[Path, int]) -> None:
        self._sizes = sizes
        self._open: dict[Path, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def opened(self, path: Path) -> int:
        """A file's descriptor; raises CheckpointError where its size is another by now."""
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(path, f"it cannot be read any more ({error}).") from error
            check_size(path, os.fstat(self._open[path]).st_size, self._sizes[path])
        return self._open[path]

    def close_before(self, path: Path) -> None:
        """Close the files before this one: what was opened first has been read first."""
        for earlier in list(self._open):
            if earlier == path:
                return
            os.close(self._open.pop(earlier))
