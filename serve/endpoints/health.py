"""Whether the process lives (/healthz), and whether a job would be run now (/readyz)."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ..openapi import NOT_READY, Readiness
from ..services import Served
from . import Endpoint

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The HTTP process answers. It says nothing about the model."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Readiness, responses=NOT_READY)
async def readyz(served: Served) -> JSONResponse:
    """200 while the worker is warm, else 503; the phase either way: starting, importing, loading, warming, ready."""
    state = served.engine.state
    body = {"ready": state.ready, "phase": state.phase, "model": state.model or served.settings.model_name}
    return JSONResponse(body, 200 if state.ready else 503)


ENDPOINT = Endpoint(router, public=True)
