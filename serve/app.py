"""The HTTP application: a lifespan around the engine, and a list of routers, one a file of `endpoints/`."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wan_runtime import Catalogue

from . import errors
from .endpoints import Endpoint
from .services import Services

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

        await self.app(scope, receive, send_with_id)


def create_app(services: Services) -> FastAPI:
    """The application. It starts the engine with itself and ends it with itself."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(services.close)

    app = FastAPI(
        title="wan-serve",
        summary="Text-to-video with quantised WAN checkpoints, over OpenAI's /v1/videos.",
        lifespan=lifespan,
        middleware=[Middleware(RequestId)],
    )
    app.state.services = services
    errors.install(app)
    for name in ENDPOINTS:
        app.include_router(ENDPOINTS[name].router)
    return app
