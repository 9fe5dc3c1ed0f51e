"""GET /metrics, for Prometheus, where `--metrics` asks for it. With API keys it needs one, as everything does."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from ..errors import ApiError
from ..services import Served
from . import Endpoint

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def metrics(request: Request, served: Served) -> Response:
    """Requests, jobs, phases, steps, failures, the queue and the worker."""
    kept = request.app.state.metrics
    if kept is None:
        raise ApiError(404, "unknown_url", "Metrics are not kept here; --metrics turns them on.")
    return Response(await run_in_threadpool(kept.text, served), media_type="text/plain; version=0.0.4")


ENDPOINT = Endpoint(router)
