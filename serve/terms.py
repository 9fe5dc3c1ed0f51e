"""On which a job is taken into the queue, and why one is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class QueueFull(Exception):
    """The queue holds `jobs` jobs, predicted to take `seconds`, and takes no more now."""

    def __init__(self, jobs: int, seconds: float) -> None:
        super().__init__(f"{jobs} jobs of {seconds:.0f} s are waiting")
        self.jobs, self.seconds = jobs, seconds


class KeyReused(Exception):
    """An idempotency key came again with another body."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On which a job is taken in: what it is predicted to cost, what may be waiting before it, its idempotency key.

    `trace` is the client's trace context, as the headers `traceparent` and `tracestate`.
    """

    cost_seconds: float = 0.0
    max_queue_seconds: float = float("inf")
    max_queue_jobs: float = float("inf")
    key: str | None = None
    fingerprint: str | None = None
    trace: Mapping[str, str] | None = None


DEFAULT_TERMS = Terms()
