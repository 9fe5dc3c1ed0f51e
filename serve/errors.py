"""Every failure as OpenAI's envelope, `{"error": {message, type, param, code}}`, so that clients can read the code.

Which status, given how the `openai` client retries (408, 409, 429 and 5xx): 400 for a body that cannot be read, 422 for
a value that cannot be served, 404 for what is not there, 503 while the model loads. Never 409: it would be retried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("wan_serve")
# What every answer carries that has not its own. Nothing that is not a page of ours may be shown as one.
SECURITY: Mapping[str, str] = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class ApiError(Exception):
    """An answer other than success. `code` is for programs, `message` for people, `param` the field at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = headers or {}


def envelope(
    status: int, code: str, message: str, param: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The body of an error answer. What a client wrote may hold half characters, which no answer can."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": {name: text and text.encode(errors="replace").decode() for name, text in told.items()}}


def not_found(video_id: str) -> ApiError:
    """No job has this id, or it was deleted."""
    return ApiError(
        404, "video_not_found", f"There is no video with the id {video_id[:80]!r}.", param="video_id"
    )


def install(app: FastAPI, methods_of: Callable[[str], list[str]]) -> None:
    """Puts the envelope around every error that `app` can answer with, also those of the framework.

    `methods_of` tells the methods that a path takes.
    """

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return _answer(request, error.status, error.code, error.message, error.param, error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("query", "path", "body")]
        param = ".".join(where) or None
        return _answer(request, 422, f"invalid_{param or 'request'}", f"{param}: {first['msg']}.", param)

    @app.exception_handler(HTTPException)
    async def framework_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        phrase = HTTPStatus(error.status_code).phrase
        message = f"{request.method} {request.url.path[:200]}: {phrase}."
        headers = dict(error.headers or {})
        if error.status_code == 405 and (methods := methods_of(request.url.path)):
            headers["allow"] = ", ".join(methods)
        return _answer(request, error.status_code, code, message, None, headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        number = request.scope.get("request_id", "unknown")
        log.error("request %s failed: %r", number, error)
        message = f"The server failed on this request; its log has the cause under the request id {number}."
        return _answer(request, 500, "internal_error", message)


def _answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    headers = dict(headers or {})
    if status == 500:  # the framework answers these outside the middleware that would add these
        headers.setdefault("x-request-id", str(request.scope.get("request_id", "")))
        headers = {**SECURITY, **headers}
    return JSONResponse(envelope(status, code, message, param), status, headers)
