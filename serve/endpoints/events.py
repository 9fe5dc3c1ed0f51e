"""GET /v1/videos/{id}/events: what happens to a job, as server-sent events, until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..events import LAST, written
from ..jobs import Job
from ..openapi import EVENTS
from ..services import Served, Services
from . import Endpoint
from .videos import find

router = APIRouter(prefix="/v1/videos", tags=["videos"])
QUIET_SECONDS = 15.0  # after which a comment keeps proxies from closing the connection
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@router.get("/{video_id}/events", response_class=StreamingResponse, responses=EVENTS)
async def video_events(video_id: str, request: Request, served: Served) -> Response:
    """Events queued, loading, text, step, decode, encode, preview, and at last done, failed or deleted.

    With `Last-Event-ID` the stream goes on behind that event; 204, which tells a browser not to come back, if that was
    the last one.
    """
    job = await run_in_threadpool(find, video_id, served)
    hub = served.engine.tell.hub
    known = hub.knows(request.headers.get("last-event-id", ""), video_id)
    if known is not None and job.status in ("completed", "failed") and not hub.after(video_id, known):
        return Response(status_code=204)
    return StreamingResponse(_stream(served, job, known), media_type="text/event-stream", headers=HEADERS)


async def _stream(served: Services, job: Job, known: int | None) -> AsyncIterator[str]:
    hub, tell = served.engine.tell.hub, served.engine.tell
    with hub.reading(job.id) as bell:
        if known is None:
            # the number first: what happens while the row is read comes again, rather than not at all
            known = hub.newest()
            now = await run_in_threadpool(served.store.get, job.id)
            name, data = await run_in_threadpool(tell.snapshot, now or job)
            yield written(f"{hub.epoch}-{known}", name, data)
            if name in LAST:
                return
        while not hub.closed:
            bell.clear()
            if events := hub.after(job.id, known):
                known = events[-1].number
                last = next((place for place, event in enumerate(events) if event.name in LAST), None)
                yield "".join(event.text for event in (events if last is None else events[: last + 1]))
                if last is not None:
                    return
                continue
            try:
                async with asyncio.timeout(QUIET_SECONDS):  # wait_for would make a task of every wait
                    await bell.wait()
            except TimeoutError:
                yield ": still here\n\n"
                # its last event may have been dropped unread, or the job be gone: a stream must not outlive it
                row = await run_in_threadpool(served.store.get, job.id)
                if row is not None and row.status in ("queued", "in_progress"):
                    continue
                if row is not None and not hub.after(job.id, known):
                    yield written(f"{hub.epoch}-{known}", *tell.snapshot(row))
                if not hub.after(job.id, known):
                    return


ENDPOINT = Endpoint(router)
