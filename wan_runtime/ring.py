"""Files read by several threads into a few host buffers, and sent on from there: memory is bounded by the buffers.

A lane is the way to a device. `GpuLane` copies out of pinned memory on a stream of its own, so that reading, copying
and what the caller computes go on side by side.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import torch

Copy: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # to, from: uint8, as many bytes in both
Fence = Callable[[], None]  # returns when what was sent before it has arrived


class Lane(Protocol):
    """Host memory, device memory, and copies from one to the other.

    buffer  host memory to send from: uint8 [nbytes].
    room    device memory to send to: uint8 [nbytes]; called by the caller's thread alone.
    send    begins copies and returns the fence behind them; called by any thread.
    arrive  makes the caller's later work on the device wait for what a fence stands behind.
    drain   returns when everything that was sent has arrived.
    """

    def buffer(self, nbytes: int) -> torch.Tensor: ...
    def room(self, nbytes: int) -> torch.Tensor: ...
    def send(self, copies: Iterable[Copy]) -> Fence: ...
    def arrive(self, fence: Fence) -> None: ...
    def drain(self) -> None: ...


class GpuLane:
    """Copies to a CUDA device on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def room(self, nbytes: int) -> torch.Tensor:
        room = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # The memory may be what the caller's stream has just let go of and still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return room

    def send(self, copies: Iterable[Copy]) -> Fence:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            for to, source in copies:
                to.copy_(source, non_blocking=True)
            event.record(self._stream)
        return _Arrival(event)

    def arrive(self, fence: Fence) -> None:
        assert isinstance(fence, _Arrival)
        torch.cuda.current_stream(self._device).wait_event(fence.event)

    def drain(self) -> None:
        self._stream.synchronize()


class _Arrival:
    """A fence that the device can wait for too."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def __call__(self) -> None:
        self.event.synchronize()


class Ring:
    """At most `count` buffers of `nbytes` of a lane, made when first needed. Any number of threads may use it."""

    def __init__(self, lane: Lane, count: int, nbytes: int) -> None:
        self._lane, self._nbytes = lane, nbytes
        self._left = threading.Semaphore(count)
        self._sent: queue.SimpleQueue[tuple[torch.Tensor, Fence]] = queue.SimpleQueue()

    def through(
        self, fill: Callable[[torch.Tensor], None], copies: Callable[[torch.Tensor], Iterable[Copy]]
    ) -> Fence:
        """Fill a buffer and send what lies in it, `copies(buffer)`; waits until a buffer is free.

        What `fill` raises comes out, and the buffer is free again.
        """
        buffer = self._take()
        fence: Fence = _nothing
        try:
            fill(buffer)
            fence = self._lane.send(copies(buffer))
        finally:
            self._sent.put((buffer, fence))
        return fence

    def _take(self) -> torch.Tensor:
        """A buffer that was never used, else the one that was sent from the longest time ago."""
        if self._left.acquire(blocking=False):
            return self._lane.buffer(self._nbytes)
        buffer, fence = self._sent.get()
        fence()
        return buffer


def _nothing() -> None:
    """The fence behind no copy."""
