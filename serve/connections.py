"""How connections are kept within bounds: how many, how long each part of a request and of its answer may take, and how
large a request's head may be.

uvicorn bounds the last only with its h11 protocol, which therefore is named: by itself it takes httptools wherever that
happens to be installed, and that reads heads of any size. It waits for ever for a head, for a body that nobody reads
any more, and for a client that does not take its answer; and it accepts connections beyond those that it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import envelope
from .guards import SecurityHeaders, answer
from .settings import Settings

GRACE_SECONDS = 10  # for answers under way when the server is told to stop
KEEP_ALIVE_SECONDS = (
    30  # longer than clients are told to wait between two polls: they meet no closed connection
)
LATE_SECONDS = 5.0  # after a body's time is over, in which whoever reads it says so (408)
HEAD_BYTES = 32 * 1024  # of one request, all its headers together; what one read brings may be more
PACE_BYTES = 64 * 1024  # of an answer, that a client takes in `download_seconds`; or what is left of it
LOOKS = 4  # at what waits, in that time; one alone may just see what is on its way
KEPT_FILES = (
    128  # descriptors that connections may not take: the database, the worker, those that are turned away
)
MOST = 2**16  # connections, however many files there may be: each takes 8 KB while idle
FILES_EACH = 3  # that a connection may take: itself, and the clip that it reads or the two files of its form
TURNED_AWAY = (
    64  # connections beyond the last that is served, which are told so; any further one is closed at once
)


class HttpConfig(uvicorn.Config):
    """uvicorn's, with how long a client may take: for a head or a body, and for 64 KiB of an answer; and how many
    connections are served."""

    def __init__(
        self, app: Any, *, upload_seconds: float, download_seconds: float, room: int, **options: Any
    ) -> None:
        super().__init__(app, **options)
        self.upload_seconds, self.download_seconds, self.room = upload_seconds, download_seconds, room


class BoundedProtocol(H11Protocol):
    """HTTP over one connection, which is closed if a request does not arrive, or its answer is not taken, in time."""

    config: HttpConfig
    _late: asyncio.TimerHandle | None = None
    _waits_for: Any = None  # h11's state in which the request is late
    _patrol: asyncio.TimerHandle | None = None
    _left, _looks = 0, 0  # of the answer: bytes not taken, and how often that was seen since it last got less

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.config.room + TURNED_AWAY:
            transport.abort()
            return
        if len(self.connections) > self.config.room:
            self.app = SecurityHeaders(_turned_away)
        _keep_out_of_the_kernel(transport)
        self._watch()
        self._look_later()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._patrol):
            if timer is not None:
                timer.cancel()

    def resume_writing(self) -> None:
        self._left = 0
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Of a request that is no HTTP; in the envelope, and only where no answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(envelope(400, "invalid_http", msg)).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            head = h11.Response(status_code=400, headers=[*headers, ("connection", "close")])
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """A head has its time from the connection's start or the last request's end, a body from its head."""
        state = self.conn.their_state
        if self._late is not None and (state is not self._waits_for or self.transport.is_closing()):
            self._late.cancel()
            self._late = None
        if self._late is None and state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing():
            seconds = self.config.upload_seconds + (LATE_SECONDS if state is h11.SEND_BODY else 0)
            self._waits_for = state
            self._late = self.loop.call_later(seconds, self.transport.close)

    def _look_later(self) -> None:
        self._patrol = self.loop.call_later(self.config.download_seconds / LOOKS, self._look)

    def _look(self) -> None:
        """Gives up a client that at several looks has taken neither all that waited, nor 64 KiB of it."""
        left = self.transport.get_write_buffer_size()
        if not self._left or left <= max(self._left - PACE_BYTES, 0):
            self._left, self._looks = left, 0
        else:
            self._looks += 1
        if self._looks == LOOKS:
            self.transport.abort()
        else:
            self._look_later()


async def _turned_away(scope: Scope, receive: Receive, send: Send) -> None:
    message = "All connections of this server are taken. Try again in a few seconds."
    await answer(send, 503, "too_many_connections", message, {"retry-after": "5"})


def _keep_out_of_the_kernel(transport: asyncio.Transport) -> None:
    """Leaves what a client does not take in this process, which counts it, and not in megabytes of the kernel's."""
    connection = transport.get_extra_info("socket")
    if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with contextlib.suppress(OSError):  # it is not TCP, or has ended
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PACE_BYTES)


def http_config(app: Any, settings: Settings) -> HttpConfig:
    """The HTTP server's configuration."""
    return HttpConfig(
        app,
        upload_seconds=settings.upload_seconds,
        download_seconds=settings.download_seconds,
        room=_room(),
        http=BoundedProtocol,
        ws="none",
        proxy_headers=False,  # nothing here depends on them, so nobody needs to be trusted with them
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        log_config=None,
        access_log=settings.log_level == "debug",  # pollers would fill the log
        server_header=False,
    )


def _room() -> int:
    """Takes all the file descriptors that this process may have, and says how many connections they are enough for."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(max((most - KEPT_FILES) // FILES_EACH, 1), MOST)
