"""Numbers for Prometheus: requests by route, jobs and their phases from seconds to hours, steps, the queue, the worker.

Requests are counted under the route's template (`/v1/videos/{video_id}`), never under what a client wrote, so that
nobody can make the server keep a series for every address they think of.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .jobs import Job
from .phases import Phase

if TYPE_CHECKING:
    from .services import Services
    from .telling import Teller

MINUTE, HOUR = 60, 3600
LONG = (
    1,
    5,
    15,
    30,
    MINUTE,
    2 * MINUTE,
    5 * MINUTE,
    10 * MINUTE,
    20 * MINUTE,
    30 * MINUTE,
    HOUR,
    2 * HOUR,
    4 * HOUR,
)
STEP = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")


class Metrics:
    """What has happened since the server started. Any thread may report."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Histogram(
            "wan_http_request_seconds",
            "Time to answer.",
            ("method", "route", "status"),
            buckets=REQUEST,
            **kept,
        )
        self.jobs = Histogram(
            "wan_job_seconds", "From a job's start to its end.", ("outcome",), buckets=LONG, **kept
        )
        self.phases = Histogram(
            "wan_phase_seconds", "Time in a phase of a job.", ("phase",), buckets=LONG, **kept
        )
        self.steps = Histogram("wan_step_seconds", "Time of a denoising step.", buckets=STEP, **kept)
        self.failures = Counter(
            "wan_job_failures", "Jobs that failed, by their error's code.", ("code",), **kept
        )
        self._since: dict[str, float] = {}  # job -> when its last step ended, or its first began

    def listen(self, tell: Teller) -> None:
        """From now on counts what becomes of jobs."""
        tell.listeners.append(self.heard)
        tell.timeline.listeners.append(self.ended)

    def heard(self, job: Job, name: str) -> None:
        """What a job has come to: here, the beginning of its first step and the end of each."""
        now = time.monotonic()
        if name == "step" and (since := self._since.get(job.id)) is not None:
            self.steps.observe(now - since)
        if name in ("denoise", "step"):
            self._since[job.id] = now
        else:
            self._since.pop(job.id, None)

    def ended(self, job: Job, phases: Sequence[Phase]) -> None:
        """A job has ended, after these phases."""
        for phase in phases:
            self.phases.labels(phase.name).observe(phase.end - phase.begin)
        end = job.completed_at or 0.0
        self.jobs.labels("failed" if job.error_code else "done").observe(end - (job.started_at or end))
        if job.error_code:
            self.failures.labels(job.error_code).inc()

    def text(self, served: Services) -> bytes:
        """Everything in Prometheus's text format, with the queue and the worker as they are now."""
        jobs, seconds = served.store.waiting()
        state = served.engine.state
        known = state.models.get(state.model or "")
        room = known.memory.room if known and known.memory else None
        gauges = {
            ("wan_queue_jobs", "Jobs that wait."): jobs,
            ("wan_queue_seconds", "What they are predicted to take."): seconds,
            ("wan_ready", "Whether a job would be run now."): int(state.ready),
            ("wan_worker_memory_bytes", "The worker's resident memory."): resident(state.pid),
        }
        held, peak = state.counters.taken()
        if held:
            gauges["wan_worker_gpu_memory_bytes", "What the worker holds of the GPUs' memory."] = held
            gauges["wan_worker_gpu_memory_peak_bytes", "The most in use since its last job began."] = peak
        memory = {
            ("wan_memory_room_bytes", "What the GPU has for a clip beside the weights."): room,
            ("wan_clip_memory_predicted_bytes", "Predicted for the last clip."): state.weighed.get(
                "predicted"
            ),
            ("wan_clip_memory_peak_bytes", "What the last clip took at its most."): state.weighed.get("peak"),
        }
        gauges |= {told: value for told, value in memory.items() if value is not None}
        lines = [
            f"# HELP {name} {told}\n# TYPE {name} gauge\n{name} {value}\n"
            for (name, told), value in gauges.items()
        ]
        return generate_latest(self.registry) + "".join(lines).encode()


def resident(pid: int | None) -> int:
    """A process's resident memory in bytes; 0 where there is none."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


class Observed:
    """Times every request under its route's template."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, route, str(status)).observe(time.monotonic() - begun)
