"""Faults of values that lie on a GPU, asked after many at a time: each answer waits for the GPU.

A check computes whether there is a fault, on the device, and hands that over with the error it would be: `at_once`
raises it here and now, `Doubts` keeps both until it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

# (bool tensor with one element: whether there is a fault; the error, made only where there is one). The error should
# hold on to no large tensor: it may be kept for long.
Refuse: TypeAlias = Callable[["torch.Tensor", Callable[[], Exception]], None]
MANY = 1024  # doubts that are settled together
# On the CPU an answer costs nothing, and numbers kept between large blocks that come and go break up the heap: a stream
# of a file of 2.4 GiB left it 2.1 GiB large.
MANY_ON_CPU = 1


def at_once(fault: torch.Tensor, error: Callable[[], Exception]) -> None:
    """Raise the error if there is a fault."""
    if bool(fault):
        raise error()


def absent(fault: torch.Tensor) -> bool:
    """Whether a fault is known not to be there; of one on a GPU nothing is known without waiting."""
    return fault.device.type == "cpu" and not bool(fault)


class Doubts:
    """Faults on a device that nobody has asked after yet, in order."""

    def __init__(self, device: torch.device) -> None:
        self._many = MANY_ON_CPU if device.type == "cpu" else MANY
        self._kept: list[tuple[torch.Tensor, Callable[[], Exception]]] = []

    def __call__(self, fault: torch.Tensor, error: Callable[[], Exception]) -> None:
        """Keep a fault for later, and settle all where there are many."""
        self._kept.append((fault.reshape(()), error))
        if len(self._kept) >= self._many:
            self.settle()

    def settle(self) -> None:
        """Raise the error of the first fault that is one; otherwise none is kept any more."""
        kept, self._kept = self._kept, []
        faults = torch.stack([fault for fault, _ in kept]).tolist() if kept else []
        for there, (_, error) in zip(faults, kept, strict=True):
            if there:
                raise error()
