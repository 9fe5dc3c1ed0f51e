"""A lane within ordinary memory: what is read, cut, ordered and bounded is the same as on the way to a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from wan_runtime.ring import Copy, Fence


class Memory:
    """Counts its buffers, and copies late: what was sent lies still until somebody waits for it.

    A buffer that is filled again before its copies were made, or a tensor that is handed on before it has arrived, has
    wrong bytes in it, as on a GPU.
    """

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.drained = False
        self._lock = threading.Lock()

    def buffer(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            self.buffers.append(torch.empty(nbytes, dtype=torch.uint8))
            return self.buffers[-1]

    def room(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def send(self, copies: Iterable[Copy]) -> Fence:
        late = list(copies)
        lock = threading.Lock()

        def arrive() -> None:
            with lock:
                for to, source in late:
                    to.copy_(source)
                late.clear()

        return arrive

    def arrive(self, fence: Fence) -> None:
        fence()

    def drain(self) -> None:
        self.drained = True
