"""From what the engine does to events that clients read: queued, loading, text, step, decode, encode, done, failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .events import Hub
from .forecast import Forecast
from .jobs import Job, JobStore
from .state import EngineState

NAMES = {"starting": "text", "text": "text", "denoise": "step", "decode": "decode", "encode": "encode"}


class Teller:
    """Publishes to `hub` what has become of a job's row."""

    def __init__(self, store: JobStore, forecast: Forecast, state: Callable[[], EngineState]) -> None:
        self.hub = Hub()
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
            return NAMES.get(job.phase or "", "step"), data
        data["queue_position"] = place
        phase = self._state().phase
        return ("queued", data) if phase == "ready" else ("loading", {**data, "phase": phase})

    def progress(self, job_id: str, phase: str) -> None:
        """A running job has come to this phase, or on in it."""
        job = self._store.get(job_id)
        if job is None:
            return
        name, data = self.snapshot(job)
        if phase == "decode":  # the last step and the start of decoding are one report of the worker's
            self.hub.publish(job_id, "step", data)
        self.hub.publish(job_id, name, data)

    def end(self, job_id: str) -> None:
        """A job has ended, or has gone back into the queue."""
        job = self._store.get(job_id)
        if job is not None:
            self.hub.publish(job_id, *self.snapshot(job))
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
