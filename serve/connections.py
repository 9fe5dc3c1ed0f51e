"""How connections are kept within bounds: how many, how long a request's head may take, and how large it may be.

uvicorn bounds none of the first two, and the third only with its h11 protocol, which therefore is named: by itself it
takes httptools wherever that happens to be installed, and that reads heads of any size.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

GRACE_SECONDS = 10  # for answers under way when the server is told to stop
KEEP_ALIVE_SECONDS = (
    30  # longer than clients are told to wait between two polls: they meet no closed connection
)
HEAD_BYTES = 32 * 1024  # of one request, all its headers together; what one read brings may be more
KEPT_FILES = 128  # descriptors that connections may not take: the database, clips, the worker


class HttpConfig(uvicorn.Config):
    """uvicorn's, with `head_seconds`: how long a connection may be open without having sent a whole head."""

    def __init__(self, app: Any, *, head_seconds: float, **options: Any) -> None:
        super().__init__(app, **options)
        self.head_seconds = head_seconds


class PunctualProtocol(H11Protocol):
    """HTTP over one connection, which is closed if the head of a request does not arrive in time."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._unwatch()
        elif self._late is None and isinstance(self.config, HttpConfig):
            self._late = self.loop.call_later(self.config.head_seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def http_config(app: Any, settings: Settings) -> HttpConfig:
    """The HTTP server's configuration."""
    return HttpConfig(
        app,
        head_seconds=settings.upload_seconds,
        http=PunctualProtocol,
        ws="none",
        proxy_headers=False,  # nothing here depends on them, so nobody needs to be trusted with them
        h11_max_incomplete_event_size=HEAD_BYTES,
        limit_concurrency=_room(),
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
    return max(min(most, 2**16) - KEPT_FILES, 1)
