"""POST /v1/videos/{id}/cancel: stops a job's work, and answers when it has stopped."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from ..errors import not_found
from ..services import Served
from ..stopping import stop_job
from . import Endpoint
from .videos import Video, describe, find

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("/{video_id}/cancel", response_model=Video)
async def cancel_video(video_id: str, served: Served) -> Video:
    """The job, failed with the code `cancelled`; or as it had ended, if it had. Its memory is free by then."""
    await run_in_threadpool(find, video_id, served)
    job = await stop_job(served, video_id)
    if job is None:  # deleted meanwhile
        raise not_found(video_id)
    return await run_in_threadpool(describe, job, served)


ENDPOINT = Endpoint(router)
