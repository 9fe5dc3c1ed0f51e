"""GET /v1/videos/{id}/events: what happens to a job, as server-sent events, until it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..events import LAST
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
            yield _written(f"{hub.epoch}-{known}", name, data)
            if name in LAST:
                return
        while not hub.closed:
            bell.clear()
            for event in hub.after(job.id, known):
                known = event.number
                yield _written(f"{hub.epoch}-{known}", event.name, event.data)
                if event.name in LAST:
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), QUIET_SECONDS)
                continue
            yield ": still here\n\n"


def _written(number: str, name: str, data: Mapping[str, Any]) -> str:
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(dict(data), separators=(',', ':'))}\n\n"


ENDPOINT = Endpoint(router)
