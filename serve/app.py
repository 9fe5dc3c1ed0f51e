"""The HTTP application: a lifespan around the engine, and a list of routers, one a file of `endpoints/`."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wan_runtime import Catalogue

from . import errors, openapi
from .auth import admit
from .endpoints import Endpoint
from .guards import Bodies, Origins, SecurityHeaders
from .logs import about
from .methods import methods_of
from .metrics import Metrics, Observed
from .services import Services
from .settings import Settings, is_loopback

ENDPOINTS = Catalogue("wan_runtime.serve.endpoints", Endpoint)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestId:
    """Gives every request a number, the client's own if it sent a plain one, and every answer `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        number = asked if REQUEST_ID.fullmatch(asked) else f"req_{secrets.token_hex(12)}"
        scope["request_id"] = number

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        with about(request=number):
            await self.app(scope, receive, send_with_id)


def create_app(services: Services) -> FastAPI:
    """The application. It starts the engine with itself and ends it with itself."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.start()
        try:
            yield
        finally:
            await run_in_threadpool(services.close)

    metrics = Metrics() if services.settings.metrics else None
    if metrics is not None:
        metrics.listen(services.engine.tell)
    app = FastAPI(
        title="wan-serve",
        summary="Text-to-video with quantised WAN checkpoints, over OpenAI's /v1/videos.",
        lifespan=lifespan,
        middleware=_middleware(services.settings, metrics),
        responses=openapi.ERRORS,
        # its own spans and logs of requests, which would quote what clients send
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        docs_url=None,  # its pages load their scripts from elsewhere; /openapi.json is ours
        redoc_url=None,
        redirect_slashes=False,  # it would lead to whatever Host says, and from a proxy's https to http
    )
    app.state.services = services
    app.state.metrics = metrics
    endpoints = [ENDPOINTS[name] for name in ENDPOINTS]
    errors.install(app, methods_of(route for endpoint in endpoints for route in endpoint.router.routes))
    guarded = [Depends(admit)]
    if services.settings.api_keys:
        guarded.append(
            Depends(HTTPBearer(auto_error=False))
        )  # refuses nothing: it says in the schema what admit does
    for endpoint in endpoints:
        app.include_router(endpoint.router, dependencies=[] if endpoint.public else guarded)
    return app


def _middleware(settings: Settings, metrics: Metrics | None) -> list[Middleware]:
    """From the outside in."""
    local_only = is_loopback(settings.host) and not settings.api_keys and not settings.allow_remote
    chain = [
        Middleware(RequestId),
        Middleware(SecurityHeaders),
        Middleware(Origins, allowed=settings.allow_origin, local_only=local_only),
        Middleware(Bodies, seconds=settings.upload_seconds),
    ]
    if metrics is not None:
        chain.insert(1, Middleware(Observed, metrics=metrics))
    if settings.allow_origin:
        chain.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allow_origin,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["authorization", "content-type", "idempotency-key"],
                expose_headers=["x-request-id", "openai-poll-after-ms", "retry-after"],
            )
        )
    return chain
