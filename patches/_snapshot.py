"""Whether tensors still hold what they held when something was made of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from wan_runtime.autograd import writes


def held(*modules: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of modules, not of what lies in them."""
    return [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def tracked(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether torch counts how often each is written: it does not for tensors made in inference mode."""
    return not any(tensor.is_inference() for tensor in tensors)


class Version:
    """A tensor as it is now, kept alive. In inference mode torch counts no writes, and it is known by itself alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._writes = tensor, writes(tensor)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether this is the tensor, unwritten since."""
        return tensor is self._tensor and writes(tensor) == self._writes


class Snapshot:
    """Which tensors they are, where their values lie, and how often torch has seen each written. It keeps none alive:
    offloading replaces them to free them.

    A write through `.data` into the same place is one that torch does not see.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises RuntimeError for a tensor that is not `tracked`."""
        self._refs = [weakref.ref(tensor) for tensor in tensors]
        self._states = [_state(tensor) for tensor in tensors]

    def matches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, unwritten since."""
        return len(tensors) == len(self._refs) and all(
            ref() is tensor and _state(tensor) == state
            for ref, tensor, state in zip(self._refs, tensors, self._states, strict=True)
        )


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version
