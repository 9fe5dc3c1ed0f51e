"""Whether a clip is taken in: what it will cost, how much is waiting before it, and whether it was asked for before."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict

from fastapi import Request

from wan_runtime import ClipRequest, Lora

from . import memory
from .errors import ApiError
from .inputs import kept
from .jobs import Job
from .logs import about
from .parsing import CreateVideo
from .services import Services
from .storage import new_id
from .terms import KeyReused, QueueFull, Terms

log = logging.getLogger("wan_serve")
KEY = re.compile(r"[\x21-\x7e]{1,255}")
MAX_QUEUE_JOBS = 10_000  # also where each is predicted to take no time
MAX_RETRY_AFTER = 120  # seconds; the openai client does not wait longer, but gives up


def idempotency(request: Request, asked: CreateVideo) -> tuple[str | None, str | None]:
    """The client's `Idempotency-Key`, and the fingerprint of what it asks for. Raises ApiError 422."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None, None
    if not KEY.fullmatch(key):
        message = "Idempotency-Key must be 1 to 255 visible ASCII characters."
        raise ApiError(422, "invalid_idempotency_key", message, param="Idempotency-Key")
    body = json.dumps(asked.model_dump(exclude_none=True), sort_keys=True)
    return key, hashlib.sha256(body.encode()).hexdigest()


def repeated(served: Services, owner: str | None, key: str, fingerprint: str | None) -> Job | None:
    """The job that this create made when it came before. Raises ApiError 422 where it was another create."""
    job = served.store.by_key(owner, key)
    if job is not None and job.fingerprint != fingerprint:
        raise _reused()
    return job


def terms_of(
    served: Services,
    model: str,
    clip: ClipRequest,
    key: str | None,
    fingerprint: str | None,
    *,
    trace: Mapping[str, str] | None = None,
    loras: Mapping[str, Lora] | None = None,
) -> Terms:
    """On which a clip may be added; `loras` has those that it names.

    Raises ApiError 422 where it alone is too much for this server.
    """
    settings = served.settings
    seconds = served.engine.forecast.seconds(clip, model)
    if seconds > settings.max_job_seconds:
        raise ApiError(
            422,
            "clip_too_costly",
            f"{clip.width}x{clip.height} with {clip.num_frames} frames in {clip.num_inference_steps} steps is "
            f"predicted to take {seconds:.0f} s here, and a clip may take {settings.max_job_seconds:.0f} s. Ask for "
            "fewer steps or frames, or a smaller size.",
            param="num_inference_steps",
        )
    _check_memory(served, model, clip, loras or {})
    return Terms(
        cost_seconds=seconds,
        max_queue_seconds=settings.max_queue_seconds,
        max_queue_jobs=MAX_QUEUE_JOBS,
        key=key,
        fingerprint=fingerprint,
        trace=trace,
    )


def _check_memory(served: Services, model: str, clip: ClipRequest, loras: Mapping[str, Lora]) -> None:
    """Raises ApiError 422 where the clip would not fit into the GPU's memory, or into what the operator gives it."""
    known, most = served.engine.state.models.get(model), served.settings.max_clip_gib
    if known is None or known.memory is None:
        return
    limits = [known.memory.room, most * memory.GIB if most is not None else None]
    there = [limit for limit in limits if limit is not None]
    beside = sum(path.stat().st_size for name in clip.lora for path in loras[name].files)
    reason = memory.refusal(known.memory, clip, known.profile.size_multiple, min(there), beside)
    if reason is not None:
        raise ApiError(422, "clip_too_large", reason, param="num_frames")


def add_job(
    served: Services,
    model: str,
    clip: ClipRequest,
    owner: str | None,
    terms: Terms,
    picture: bytes | None = None,
) -> Job:
    """Puts the clip, and the PNG that it starts from, in the queue.

    Raises ApiError 429 where that is full, 422 for a key that was used before.
    """
    job_id = new_id()
    try:
        with kept(served.storage, job_id, picture):
            job = served.store.add(job_id, model, asdict(clip), owner=owner, terms=terms)
    except KeyReused:
        raise _reused() from None
    except QueueFull as full:
        over = full.seconds + terms.cost_seconds - terms.max_queue_seconds
        wait = max(1, min(math.ceil(over), MAX_RETRY_AFTER))
        raise ApiError(
            429,
            "queue_full",
            f"{full.jobs} jobs are waiting, predicted to take {full.seconds:.0f} s; with this one's "
            f"{terms.cost_seconds:.0f} s that would be more than the {terms.max_queue_seconds:.0f} s that this "
            f"server lets wait. Try again in {wait} s.",
            headers={"Retry-After": str(wait)},
        ) from None
    if job.id != job_id:  # the same create came twice at once
        served.storage.delete(job_id)
        return job
    with about(job=job_id):
        log.info("%s was queued", job_id)
    return job


def _reused() -> ApiError:
    message = "This Idempotency-Key was used for another body. A new create needs a new key."
    return ApiError(422, "idempotency_key_reused", message, param="Idempotency-Key")
