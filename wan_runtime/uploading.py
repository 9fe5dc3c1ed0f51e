"""A checkpoint's tensors onto a device, in turn: memory-mapped, or to a GPU read by threads through pinned memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from wan_runtime.ahead import ahead
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header, check_size, typed
from wan_runtime.ring import Copy, Fence, GpuLane, Lane, Ring
from wan_runtime.spans import Span, spans

THREADS = 16  # that read; more than the cores, as a disk answers better to many
SPAN = 8 * 2**20
BUFFERS = 24  # of SPAN bytes: one a thread, and some that are still being copied from


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
    """A span, the file it is read from, and the device memory of the tensor that each of its parts belongs to."""

    span: Span
    descriptor: int
    rooms: tuple[torch.Tensor, ...]


def uploaded(
    header: Header, keys: Iterable[str], lane: Lane, *, threads: int = THREADS, span: int = SPAN
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `tensors_on`, by way of a lane."""
    ring = Ring(lane, max(2, threads * BUFFERS // THREADS), span)
    rooms: dict[str, torch.Tensor] = {}  # of tensors that are on the way
    with contextlib.ExitStack() as stack:
        stack.callback(lane.drain)  # a consumer that stops early must not free what is still being written
        files = stack.enter_context(_Files(header.files))

        def job(found: Span) -> _Job:
            for part in found.parts:
                if part.key not in rooms:
                    with torch.inference_mode(
                        False
                    ):  # other threads write to it, and are not in the caller's mode
                        rooms[part.key] = lane.room(header.entries[part.key].nbytes)
            return _Job(found, files.opened(found.file), tuple(rooms[part.key] for part in found.parts))

        def work(job: _Job) -> tuple[Span, Fence]:
            return job.span, ring.through(partial(_fill, job), partial(_copies, job))

        jobs = map(job, spans(header.entries, keys, span))
        read = ahead(jobs, work, lambda job: job.span.size, threads=threads, budget=threads * span)
        stack.enter_context(contextlib.closing(read))
        for found, fence in read:
            files.close_before(found.file)
            lane.arrive(fence)
            for part in found.parts:
                entry = header.entries[part.key]
                if part.offset + part.size == entry.nbytes:
                    yield part.key, typed(rooms.pop(part.key), entry)


def _fill(job: _Job, buffer: torch.Tensor) -> None:
    """Read a span's bytes into the start of a buffer."""
    span = job.span
    bytes_ = buffer.numpy().data
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


def _copies(job: _Job, buffer: torch.Tensor) -> Iterator[Copy]:
    for part, room in zip(job.span.parts, job.rooms, strict=True):
        if part.size:
            yield room[part.offset : part.offset + part.size], buffer[part.at : part.at + part.size]


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
