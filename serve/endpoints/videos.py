"""OpenAI's /v1/videos, as the `openai` client speaks it, with what decided the clip told besides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from wan_runtime import ClipProfile

from ..admission import add_job, idempotency, repeated, terms_of
from ..auth import Asker, Caller, check_limits
from ..clip_files import ClipFile
from ..errors import ApiError, not_found
from ..forecast import poll_after_ms
from ..jobs import Job
from ..openapi import binary, create_body
from ..parsing import CreateVideo, clip_request, read_create
from ..services import Served, Services
from ..stopping import stop_job
from ..storage import ID, Storage
from ..sweeper import expires_at
from ..uploads import Count
from . import Endpoint
from .models import unknown_model

router = APIRouter(prefix="/v1/videos", tags=["videos"])
LIST_QUERY = ("after", "limit", "order")
VARIANTS: dict[str, tuple[str, Callable[[Storage, str], Path]]] = {
    "video": ("video/mp4", Storage.video),
    "thumbnail": ("image/webp", Storage.thumbnail),
    "spritesheet": ("image/jpeg", Storage.spritesheet),
    "start_image": ("image/png", Storage.start_image),
}
Variant = Annotated[str, Query(json_schema_extra={"enum": list(VARIANTS)})]
KINDS = [kind for kind, _ in VARIANTS.values()]
CONTENT = binary(*KINDS) | binary(*KINDS, "multipart/byteranges", status=206)
NO_RETRY = {"x-should-retry": "false"}
BODY = {"requestBody": create_body(CreateVideo)}


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
    eta_seconds: float | None
    seed: int
    negative_prompt: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    flow_shift: float | None
    image: str | None = None
    lora: dict[str, float] = {}
    made_with: dict[str, Any] | None


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


def describe(job: Job, served: Services) -> Video:
    """A job as clients see it."""
    asked = dict(job.request)
    width, height = asked.pop("width"), asked.pop("height")
    place, eta = served.engine.forecast.outlook(job)
    expires = expires_at(job, served.settings)
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
        queue_position=place,
        eta_seconds=round(eta, 1) if eta is not None else None,
        expires_at=int(expires) if expires is not None else None,
        made_with=dict(job.made_with) if job.made_with and job.status == "completed" else None,
        **asked,
    )


def find(video_id: str, served: Services) -> Job:
    """The job of an id. Raises ApiError 404."""
    job = served.store.get(video_id) if ID.fullmatch(video_id) else None
    if job is None:
        raise not_found(video_id)
    return job


@router.post("", response_model=Video, openapi_extra=BODY)
async def create_video(request: Request, response: Response, served: Served, asker: Asker) -> Video:
    """Puts a clip in the queue. Everything is checked here, before the model sees it."""
    with served.uploads.counting() as count:  # until the image, if there is one, has been made small
        job = await _created(request, served, asker, count)
    video = await run_in_threadpool(describe, job, served)
    response.headers["openai-poll-after-ms"] = str(poll_after_ms(video.eta_seconds))
    return video


async def _created(request: Request, served: Services, asker: Caller, count: Count) -> Job:
    asked, reference = await read_create(request, served.uploads, count)
    model = served.settings.model_name if asked.model is None else asked.model
    if model not in served.settings.models:
        raise unknown_model(model, served)
    profile = _profile(served, model)
    key, fingerprint = idempotency(request, asked)
    job = await run_in_threadpool(repeated, served, asker.owner, key, fingerprint) if key else None
    if job is None:
        loras = await run_in_threadpool(served.loras, model) if asked.lora else None
        clip = clip_request(asked, profile, loras)
        trace = served.trace(request)
        terms = terms_of(served, model, clip, key, fingerprint, trace=trace, loras=loras)
        picture: bytes | None = None
        if reference is not None:
            clip, picture = await served.intake.take(reference, clip)
        async with served.creating:
            check_limits(asker, served)
            job = await run_in_threadpool(add_job, served, model, clip, asker.owner, terms, picture)
        served.engine.wake()
    return job


def _profile(served: Services, model: str) -> ClipProfile:
    state = served.engine.state
    if served.engine.draining:
        message = "The server is stopping and takes no more jobs. Ask again when it is back."
        raise ApiError(503, "server_draining", message, headers={"Retry-After": "10"})
    known = state.models.get(model)
    if known is None:
        message = f"The model is not ready yet ({state.phase}). /readyz says when it is."
        raise ApiError(503, "model_not_ready", message, headers={"Retry-After": "2"})
    return known.profile


async def _known_query(request: Request) -> None:
    """Someone who writes `per_page=5` must not get a page of 20."""
    for name in request.query_params:
        if name not in LIST_QUERY:
            message = f"{name[:80]!r} is not known. Known: {', '.join(LIST_QUERY)}."
            raise ApiError(400, "unknown_parameter", message, param=name[:80])


@router.get("", response_model=VideoList, dependencies=[Depends(_known_query)])
def list_videos(
    served: Served,
    asker: Asker,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The jobs, newest first unless asked otherwise, in pages."""
    cursor = find(after, served) if after is not None else None
    jobs = served.store.page(after=cursor, limit=limit + 1, newest_first=order == "desc", owner=asker.owner)
    page = [describe(job, served) for job in jobs[:limit]]
    return VideoList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(jobs) > limit,
    )


@router.get("/{video_id}", response_model=Video)
async def retrieve_video(video_id: str, served: Served) -> Response:
    """One job, with its progress in percent of denoising steps."""
    # What is asked most: read here and not in another thread, and written by the model itself.
    video = describe(find(video_id, served), served)
    headers = (
        {"openai-poll-after-ms": str(poll_after_ms(video.eta_seconds))}
        if video.eta_seconds is not None
        else {}
    )
    return Response(video.model_dump_json(), media_type="application/json", headers=headers)


@router.get("/{video_id}/content", response_class=FileResponse, responses=CONTENT)
def download_content(video_id: str, served: Served, variant: Variant = "video") -> FileResponse:
    """The finished clip as MP4, its thumbnail as WebP, a spritesheet as JPEG, or what it began with as PNG."""
    job = find(video_id, served)
    if variant not in VARIANTS:
        message = f"The variant {variant[:40]!r} is not made here. Known: {', '.join(VARIANTS)}."
        raise ApiError(400, "unsupported_variant", message, param="variant")
    if job.status == "failed":
        message = f"The video failed ({job.error_code}) and has no content: {job.error_message}"
        raise ApiError(400, "video_failed", message, headers=NO_RETRY)
    if job.status != "completed":
        message = f"The video is {job.status} ({job.progress} %); its content is there once it is completed."
        raise ApiError(400, "video_not_ready", message, headers=NO_RETRY)
    kind, path_of = VARIANTS[variant]
    path = path_of(served.storage, job.id)
    if variant == "start_image" and not job.request.get("image"):
        raise ApiError(400, "unsupported_variant", "This clip did not start from an image.", param="variant")
    try:
        return ClipFile(path, kind)
    except FileNotFoundError:  # deleted since, by another request
        raise not_found(video_id) from None


@router.delete("/{video_id}", response_model=VideoDeleted)
async def delete_video(video_id: str, served: Served) -> VideoDeleted:
    """Removes a job and its clip. A running one is stopped first, and the answer comes when it has stopped."""
    await run_in_threadpool(find, video_id, served)
    if await stop_job(served, video_id) is None or not await run_in_threadpool(_remove, served, video_id):
        raise not_found(video_id)  # someone else has deleted it
    return VideoDeleted(id=video_id)


def _remove(served: Services, video_id: str) -> bool:
    """The row first, which is the truth; files without one go at the next start at the latest."""
    removed = served.store.delete(video_id, unless="in_progress")
    if removed:
        served.storage.delete(video_id)
        served.engine.tell.deleted(video_id)
    return removed


ENDPOINT = Endpoint(router)
