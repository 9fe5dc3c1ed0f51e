"""What becomes of a job that did not end by itself: its worker died, it was cancelled, or its model is gone."""

from __future__ import annotations

import signal

from .jobs import Job, JobStore
from .storage import Storage


def fail_cancelled(store: JobStore, job_id: str) -> Job | None:
    """A running job has been stopped, because nobody wants it any more. The job, failed, if it was running."""
    job = store.get(job_id)
    if job is None:
        return None
    steps = f"{job.step} of {job.request['num_inference_steps']} steps"
    return store.fail(job_id, "cancelled", f"The job was cancelled while it ran, after {steps}.")


def fail_unserved(store: JobStore, job: Job) -> None:
    """A queued job's model is not among those that this server was started with."""
    message = f"The server was started anew without the model {job.model!r}, of which this job was asked."
    store.fail(job.id, "model_not_served", message, status="queued")


def settle(
    store: JobStore, storage: Storage, job: Job, reason: str, *, unwanted: bool, stopping: bool
) -> None:
    """The worker ended, for this reason, while it was on the job."""
    if size := storage.size(job.id):  # its files are whole: it ended before it could say that it was done
        store.complete(job.id, size=size)
    elif unwanted:
        fail_cancelled(store, job.id)
    elif stopping:
        store.requeue(job.id, counts=False)
    else:
        steps = job.request["num_inference_steps"]
        where = f"in the phase {job.phase!r}, after {job.step} of {steps} steps"
        store.interrupted(job, "worker_died", f"The worker process ended {where}: {reason}.")


def how_it_ended(code: int | None) -> str:
    """A process's exit status in words."""
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it exited with the status {code}"
