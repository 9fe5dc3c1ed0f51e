"""Ending a job that is queued or runs, and answering only when it has ended and its memory is free."""

from __future__ import annotations

import time

import anyio
from starlette.concurrency import run_in_threadpool

from .jobs import Job
from .services import Services

LOOK_SECONDS = 0.02


async def stop_job(served: Services, job_id: str) -> Job | None:
    """The job once it has ended: cancelled, unless it had ended before. None if it was deleted meanwhile.

    A worker that has not obeyed within `cancel_seconds` is killed.
    """
    deadline = time.monotonic() + served.settings.cancel_seconds
    while True:
        job = await run_in_threadpool(served.store.get, job_id)
        if job is None or job.status in ("completed", "failed"):
            return job
        if job.status == "queued":
            await run_in_threadpool(_drop, served, job_id)
            continue
        served.engine.cancel(job_id)
        if time.monotonic() > deadline:
            served.engine.kill(job_id)
        await anyio.sleep(LOOK_SECONDS)


def _drop(served: Services, job_id: str) -> None:
    message = "The job was cancelled before it was begun."
    if job := served.store.fail(job_id, "cancelled", message, status="queued"):
        served.engine.tell.end(job_id, job)
