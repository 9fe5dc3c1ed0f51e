"""When jobs will be done: what is left of the running one, and what was predicted for those that wait before one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wan_runtime import ClipRequest

from . import costs
from .jobs import Job, JobStore
from .state import EngineState

POLL_SHARE = 50  # a client that polls this often until the end sees every two percent
POLL_MS = (250, 5000)


class Forecast:
    """Predictions from the current state: 0 until the model has been warmed up, and without the time to load one."""

    def __init__(self, store: JobStore, state: Callable[[], EngineState]) -> None:
        self._store, self._state = store, state

    def seconds(self, request: Mapping[str, Any] | ClipRequest, model: str) -> float:
        """How long a clip of a model will take, once it is begun."""
        known = self._state().models.get(model)
        return costs.clip_seconds(known.speed, _request(request), known.profile) if known else 0.0

    def left(self, job: Job) -> float:
        """What is left of a running job."""
        known = self._state().models.get(job.model)
        if known is None:
            return 0.0
        request = _request(job.request)
        tail = costs.tail_seconds(known.speed, request)
        if job.phase in ("decode", "encode"):
            return tail
        if job.step == 0:
            return costs.clip_seconds(known.speed, request, known.profile)
        step = costs.step_seconds(known.speed, request, known.profile.size_multiple)
        return (request.num_inference_steps - job.step) * step + tail

    def outlook(self, job: Job) -> tuple[int | None, float | None]:
        """How many jobs wait before a queued one, and the seconds until it or a running one is done; else None."""
        if job.status == "in_progress":
            return None, self.left(job)
        if job.status != "queued":
            return None, None
        jobs, before = self._store.waiting(job)
        running = sum(map(self.left, self._store.with_status("in_progress")))
        return jobs, running + before + self.seconds(job.request, job.model)

    def eta(self, job: Job) -> float | None:
        """Seconds until a queued or running job is done, or None for one that has ended."""
        return self.outlook(job)[1]


def poll_after_ms(eta: float | None) -> int:
    """When to ask again for a job that is done in so many seconds. The client reads this once, on its first poll."""
    low, high = POLL_MS
    return round(min(max(1000 * (eta or 0.0) / POLL_SHARE, low), high))


def _request(request: Mapping[str, Any] | ClipRequest) -> ClipRequest:
    return request if isinstance(request, ClipRequest) else ClipRequest(**request)
