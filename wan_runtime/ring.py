"""A few host buffers, filled and sent on from in turn: memory is bounded by them.

A lane is the way to a device. `GpuLane` copies out of pinned memory on a stream of its own, so that reading, copying
and what the caller computes go on side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import torch

Copy: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # to, from: uint8, as many bytes in both
Fence = Callable[[], None]  # returns when what was sent before it has arrived


class Lane(Protocol):
    """Host memory, device memory, and copies from one to the other. One thread calls all of it.

    buffer  host memory to send from: uint8 [nbytes].
    room    device memory to send to: uint8 [nbytes].
    send    begins copies and returns the fence behind them.
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
    """At most `count` buffers of `nbytes` of a lane, made when first needed."""

    def __init__(self, lane: Lane, count: int, nbytes: int) -> None:
        self._lane, self._count, self._nbytes = lane, count, nbytes
        self._sent: deque[tuple[torch.Tensor, Fence]] = deque()

    def take(self) -> torch.Tensor:
        """A buffer that was never used, else the one that was given back the longest time ago, once it is free."""
        if self._count:
            self._count -= 1
            return self._lane.buffer(self._nbytes)
        buffer, fence = self._sent.popleft()
        fence()
        return buffer

    def give(self, buffer: torch.Tensor, fence: Fence) -> None:
        """Give a buffer back; it is free behind the fence."""
        self._sent.append((buffer, fence))
