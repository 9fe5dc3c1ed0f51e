"""What the worker has done, and the memory it takes on GPUs, in memory that both processes see: true even while the
worker says nothing.

The engine reads it to notice a worker that hangs, and /v1/models shows it, so that anybody can see that a cancelled
job's steps have stopped.
"""

from __future__ import annotations

from collections.abc import MutableSequence

NAMES = (
    "steps",
    "chunks",
    "clips",
)  # denoising steps, decoded chunks of frames, finished clips, of every job

SIZE = len(NAMES) + 2


class Counters:
    """Counts over one worker's life, in shared memory of SIZE numbers. One thread writes."""

    def __init__(self, shared: MutableSequence[int]) -> None:
        self._shared = shared

    def count(self, name: str) -> int:
        """Adds one, and gives the sum."""
        self._shared[NAMES.index(name)] += 1
        return self._shared[NAMES.index(name)]

    def read(self) -> dict[str, int]:
        """All of them by name."""
        return dict(zip(NAMES, self._shared, strict=False))

    def take(self, held: int, peak: int) -> None:
        """Notes the bytes that the worker holds on GPUs, and the most that were in use since its last job began."""
        self._shared[len(NAMES) : SIZE] = [held, peak]

    def taken(self) -> tuple[int, int]:
        """The bytes held on GPUs, and the most in use; zeros without a GPU."""
        held, peak = self._shared[len(NAMES) : SIZE]
        return held, peak
