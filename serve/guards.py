"""What every request passes before an endpoint sees it, and what every answer carries.

Plain ASGI, outermost first: `SecurityHeaders`; `Origins`, because a page of any site can make a browser send requests
to this machine's loopback address; `Bodies`, because a body that trickles in would hold a connection for ever.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping

import anyio
from starlette.datastructures import Headers as RequestHeaders
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import SECURITY, ApiError, envelope
from .settings import is_loopback


class SecurityHeaders:
    """Puts `errors.SECURITY` on every answer, under the headers that the answer has itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Origins:
    """Refuses browsers' requests from other sites, and, on the loopback address, names of it that others chose.

    A page of another site can post a form to 127.0.0.1, though not read the answer; with a domain that resolves to
    127.0.0.1 (DNS rebinding) it could do both. `local_only` asks for a loopback name in Host.
    """

    def __init__(self, app: ASGIApp, *, allowed: tuple[str, ...], local_only: bool) -> None:
        self.app, self.allowed, self.local_only = app, allowed, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(RequestHeaders(scope=scope))):
            await answer(send, 403, *refusal)
            return
        await self.app(scope, receive, send)

    def _refusal(self, headers: RequestHeaders) -> tuple[str, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local_only and not is_loopback(_name_of(host)):
            return "host_refused", (
                f"This server answers to names of this machine, not to {host[:80]!r}. Use 127.0.0.1 or localhost, or "
                "start it with --api-keys or --allow-remote."
            )
        if origin is None or origin in self.allowed or origin.partition("://")[2] == host:
            return None
        return "origin_refused", (
            f"Pages of {origin[:80]!r} may not use this server; --allow-origin names those that may."
        )


class Bodies:
    """Takes no compressed body and none of unclear length (a proxy might see its end elsewhere, and the rest as another
    client's request), and gives a body `seconds` to arrive."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = RequestHeaders(scope=scope)
        if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
            message = (
                "Content-Length and Transfer-Encoding disagree on where the body ends: send one of them."
            )
            await answer(send, 400, "ambiguous_length", message)
            return
        coding = headers.get("content-encoding", "identity")
        if coding.strip().lower() not in ("", "identity"):
            await answer(send, 415, "unsupported_media_type", "Bodies are taken as they are, not compressed.")
            return
        await self.app(scope, _in_time(receive, self.seconds), send)


def _in_time(receive: Receive, seconds: float) -> Callable[[], Awaitable[Message]]:
    """`receive`, whose body has to be complete `seconds` after the first part of it was asked for."""
    deadline: float | None = None
    complete = False

    async def receive_in_time() -> Message:
        nonlocal deadline, complete
        if complete:  # what comes now is the client's end, for which a stream may wait as long as it likes
            return await receive()
        deadline = anyio.current_time() + seconds if deadline is None else deadline
        with anyio.CancelScope(deadline=deadline):
            message = await receive()
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message
        raise ApiError(
            408,
            "upload_too_slow",
            f"The body did not arrive within {seconds:g} s.",
            headers={"connection": "close", "x-should-retry": "false"},
        )

    return receive_in_time


async def answer(
    send: Send, status: int, code: str, message: str, more: Mapping[str, str] | None = None
) -> None:
    """An error in OpenAI's envelope, given before any endpoint was reached. The rest of the request is not read.

    `more` are headers.
    """
    body = json.dumps(envelope(status, code, message)).encode()
    headers = [
        *((name.encode(), value.encode()) for name, value in (more or {}).items()),
        (b"content-type", b"application/json"),
        (b"connection", b"close"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name_of(host: str) -> str:
    """The name in a Host header, without the port: `[::1]:8000` is ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
