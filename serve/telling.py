"""From what the engine does to events that clients read: queued, loading, text, step, decode, encode, done, failed.

Listeners are told of all jobs, watched or not, and also of `denoise`, the beginning of the first step. That is no event
of the stream, whose readers are told of steps that are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .events import Hub
from .forecast import Forecast
from .jobs import Job, JobStore
from .phases import Timeline
from .state import EngineState

NAMES = {"starting": "text", "text": "text", "denoise": "step", "decode": "decode", "encode": "encode"}


class Teller:
    """Publishes to `hub`, and tells `listeners`, what has become of a job's row. `timeline` is the first of them."""

    def __init__(self, store: JobStore, forecast: Forecast, state: Callable[[], EngineState]) -> None:
        self.hub, self.timeline = Hub(), Timeline()
        self.listeners: list[Callable[[Job, str], None]] = [self.timeline.heard]
        self._store, self._forecast, self._state = store, forecast, state

    def snapshot(self, job: Job) -> tuple[str, dict[str, Any]]:
        """The event that says where a job stands, from its row."""
        data: dict[str, Any] = {
            "id": job.id,
            "status": job.status,
            "progress": job.progress,
            "step": job.step,
            "steps": int(job.request["num_inference_steps"]),
        }
        if job.status in ("queued", "in_progress"):
            place, eta = self._forecast.outlook(job)
            data["eta_seconds"] = round(eta, 1) if eta is not None else None
        if job.status == "completed":
            return "done", data
        if job.status == "failed":
            return "failed", {**data, "error": {"code": job.error_code, "message": job.error_message}}
        if job.status == "in_progress":
            first = job.phase == "denoise" and job.step == 0  # no step is done yet
            return "text" if first else NAMES.get(job.phase or "", "step"), data
        data["queue_position"] = place
        phase = self._state().phase
        return ("queued", data) if phase == "ready" else ("loading", {**data, "phase": phase})

    def progress(self, job_id: str, phase: str) -> None:
        """A running job has come to this phase, or on in it."""
        job = self._store.get(job_id)
        if job is None:
            return
        name, data = self.snapshot(job)
        if phase == "denoise" and job.step == 0:
            self._tell(job, "denoise")
            return
        # the last step and the start of decoding are one report of the worker's
        for each in ("step", name) if phase == "decode" else (name,):
            self.hub.publish(job_id, each, data)
            self._tell(job, each)

    def end(self, job_id: str, row: Job | None = None) -> None:
        """A job has ended (with this row, where the caller has it: it may be deleted by now), or is queued again."""
        job = row or self._store.get(job_id)
        if job is not None:
            name, data = self.snapshot(job)
            self.hub.publish(job_id, name, data)
            self._tell(job, name)
        self.queue()

    def entered(self, phase: str) -> None:
        """The worker has come to one of its own phases."""
        self.timeline.entered(phase)
        self.queue()

    def deleted(self, job_id: str) -> None:
        """A job is gone."""
        self.hub.publish(job_id, "deleted", {"id": job_id})
        self.queue()

    def queue(self) -> None:
        """The queue has moved, or the worker's phase has: those who watch a waiting job are told."""
        for job_id in self.hub.read_jobs():
            job = self._store.get(job_id)
            if job is not None and job.status == "queued":
                self.hub.publish(job_id, *self.snapshot(job))

    def _tell(self, job: Job, name: str) -> None:
        for listener in self.listeners:
            listener(job, name)
