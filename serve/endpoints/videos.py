"""OpenAI's /v1/videos, as the `openai` client speaks it, with what decided the clip told besides."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Literal

import anyio
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from ..errors import ApiError, not_found
from ..jobs import Job
from ..parsing import CreateVideo, clip_request, read_create
from ..services import Served, Services
from ..storage import ID, new_id
from . import Endpoint
from .models import unknown_model

router = APIRouter(prefix="/v1/videos", tags=["videos"])
LIST_QUERY = ("after", "limit", "order")
NO_RETRY = {"x-should-retry": "false"}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": CreateVideo.model_json_schema()}
            for kind in ("multipart/form-data", "application/json")
        },
    }
}


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job, in OpenAI's fields; those after `error` are ours."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None = None
    prompt: str
    remixed_from_video_id: str | None = None
    seconds: str
    size: str
    error: VideoError | None
    phase: str | None
    step: int
    queue_position: int | None
    seed: int
    negative_prompt: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    flow_shift: float | None


class VideoList(BaseModel):
    """A page of jobs; `last_id` is the next page's `after`."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A job is gone, its work stopped and its file removed."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def _video(job: Job, served: Services) -> Video:
    asked = dict(job.request)
    width, height = asked.pop("width"), asked.pop("height")
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=int(job.completed_at) if job.completed_at else None,
        seconds=f"{asked['num_frames'] / asked['fps']:g}",
        size=f"{width}x{height}",
        error=VideoError(code=job.error_code, message=job.error_message or "") if job.error_code else None,
        phase=job.phase,
        step=job.step,
        queue_position=served.store.queued_before(job) if job.status == "queued" else None,
        **asked,
    )


def _find(video_id: str, served: Services) -> Job:
    job = served.store.get(video_id) if ID.fullmatch(video_id) else None
    if job is None:
        raise not_found(video_id)
    return job


def _poll_after(served: Services) -> str:
    """When to ask again: about once a step. The client reads this once, on its first poll."""
    return str(round(1000 * min(max(served.engine.state.step_seconds, 0.25), 5)))


@router.post("", response_model=Video, openapi_extra=BODY)
async def create_video(request: Request, response: Response, served: Served) -> Video:
    """Puts a clip in the queue. Everything is checked here, before the model sees it."""
    asked = await read_create(request)
    if asked.model is not None and asked.model != served.settings.model_name:
        raise unknown_model(asked.model, served)
    state = served.engine.state
    if state.profile is None:
        message = f"The model is not ready yet ({state.phase}). /readyz says when it is."
        raise ApiError(503, "model_not_ready", message, headers={"Retry-After": "2"})
    clip = clip_request(asked, state.profile)
    job = await run_in_threadpool(served.store.add, new_id(), served.settings.model_name, asdict(clip))
    served.engine.wake()
    response.headers["openai-poll-after-ms"] = _poll_after(served)
    return _video(job, served)


async def _known_query(request: Request) -> None:
    """Someone who writes `per_page=5` must not get a page of 20."""
    for name in request.query_params:
        if name not in LIST_QUERY:
            message = f"{name[:80]!r} is not known. Known: {', '.join(LIST_QUERY)}."
            raise ApiError(400, "unknown_parameter", message, param=name[:80])


@router.get("", response_model=VideoList, dependencies=[Depends(_known_query)])
def list_videos(
    served: Served,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The jobs, newest first unless asked otherwise, in pages."""
    cursor = _find(after, served) if after else None
    jobs = served.store.page(after=cursor, limit=limit + 1, newest_first=order == "desc")
    page = [_video(job, served) for job in jobs[:limit]]
    return VideoList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(jobs) > limit,
    )


@router.get("/{video_id}", response_model=Video)
def retrieve_video(video_id: str, response: Response, served: Served) -> Video:
    """One job, with its progress in percent of denoising steps."""
    job = _find(video_id, served)
    if job.status in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = _poll_after(served)
    return _video(job, served)


@router.get("/{video_id}/content", response_class=FileResponse)
def download_content(video_id: str, served: Served, variant: str = "video") -> FileResponse:
    """The finished clip, as MP4. Byte ranges are served."""
    job = _find(video_id, served)
    if variant != "video":
        message = f"The variant {variant[:40]!r} is not made here; only 'video' is."
        raise ApiError(400, "unsupported_variant", message, param="variant")
    if job.status == "failed":
        message = f"The video failed ({job.error_code}) and has no content: {job.error_message}"
        raise ApiError(400, "video_failed", message, headers=NO_RETRY)
    if job.status != "completed":
        message = f"The video is {job.status} ({job.progress} %); its content is there once it is completed."
        raise ApiError(400, "video_not_ready", message, headers=NO_RETRY)
    path = served.storage.video(job.id)
    if not path.is_file():  # deleted since, by another request
        raise not_found(video_id)
    return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")


@router.delete("/{video_id}", response_model=VideoDeleted)
async def delete_video(video_id: str, served: Served) -> VideoDeleted:
    """Removes a job and its clip. A running one is stopped first, and the answer comes when it has stopped."""
    job = await run_in_threadpool(_find, video_id, served)
    deadline = time.monotonic() + served.settings.cancel_seconds
    while not await run_in_threadpool(served.store.delete, job.id, unless="in_progress"):
        await run_in_threadpool(_find, video_id, served)  # someone else may have deleted it
        served.engine.cancel(job.id)
        if time.monotonic() > deadline:
            served.engine.kill(job.id)
        await anyio.sleep(0.02)
    await run_in_threadpool(served.storage.delete, job.id)
    return VideoDeleted(id=job.id)


ENDPOINT = Endpoint(router)
