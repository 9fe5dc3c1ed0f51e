"""Who asks, whether they may, and how much. One dependency on every endpoint that is not public.

Without keys every caller is the same one, whatever bearer token it sends, and the server listens on the loopback
address. With keys a caller is its key: it sees its own jobs and no others, whose very existence it cannot tell.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Request

from .errors import ApiError, not_found
from .keys import ApiKey, KeyRing
from .services import Served, Services

log = logging.getLogger("wan_serve")
MINUTE = 60.0


@dataclass(frozen=True)
class Caller:
    """Who sent a request. Without keys `owner` is None, and every job is everybody's."""

    owner: str | None = None
    max_active: int | None = None
    per_minute: int | None = None


async def admit(request: Request, served: Served) -> Caller:
    """The caller of this request. Raises ApiError: 401 for no valid key, 404 for a job of another key."""
    if served.keys is None:
        return Caller()
    key = await _key_of(request, served.keys)
    if key is None:
        raise ApiError(
            401,
            "invalid_api_key",
            "This server needs an API key, as `Authorization: Bearer wan_...`; what was sent is none that it knows.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    for video_id in (request.path_params.get("video_id"), request.query_params.get("after")):
        if video_id is not None and not _owns(served, key.id, video_id):
            raise not_found(video_id)
    return Caller(key.id, key.max_active, key.per_minute)


Asker = Annotated[Caller, Depends(admit)]


def check_limits(caller: Caller, served: Services) -> None:
    """Counts one more create. Raises ApiError 429 where the key's limits leave no room for it, with the numbers."""
    if caller.owner is None or served.keys is None:
        return
    if caller.max_active is not None:
        active = served.store.active(caller.owner)
        if active >= caller.max_active:
            message = f"This API key has {active} jobs queued or running, and may have {caller.max_active}."
            raise ApiError(429, "too_many_jobs", message, headers={"Retry-After": "5"})
    if caller.per_minute is not None:
        now, times = time.monotonic(), served.keys.creates[caller.owner]
        while times and now - times[0] >= MINUTE:
            times.popleft()
        if len(times) >= caller.per_minute:
            wait = int(MINUTE - (now - times[0])) + 1
            message = (
                f"This API key may create {caller.per_minute} videos a minute; the next one in {wait} s."
            )
            raise ApiError(429, "rate_limited", message, headers={"Retry-After": str(wait)})
        times.append(now)


async def _key_of(request: Request, ring: KeyRing) -> ApiKey | None:
    try:
        ring.refresh()
    except (OSError, ValueError) as error:
        log.error("the API keys stay as they were: %s", error)
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    presented = presented.strip()
    if scheme.lower() != "bearer" or not presented:
        return None
    known = ring.known(presented)
    if known is not None:
        return known
    return await to_thread.run_sync(ring.find, presented, limiter=ring.one_at_a_time)


def _owns(served: Services, owner: str, video_id: str) -> bool:
    job = served.store.get(video_id)
    return job is not None and job.owner == owner
