"""Clients that hold connections, over real sockets, against the protocol that `wan-serve` runs, on a small application.

What a client may take is given in fractions of a second here; `test_guards.py` has the same on the whole server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from wan_runtime.serve import connections
from wan_runtime.serve.connections import FILES_EACH, KEPT_FILES, LATE_SECONDS, TURNED_AWAY, http_config
from wan_runtime.serve.settings import Settings

LARGE = 24 * 2**20
SECONDS = 0.8
ROOM = 4


@dataclass(frozen=True)
class Running:
    server: uvicorn.Server
    port: int
    file: Path

    def connect(self, *, little: bool = False) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(20)
        if little:  # so that the kernel's own buffers hold little of what is not read
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        return connection

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)

    def holds_the_file(self) -> bool:
        links = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        return any(os.path.realpath(link) == str(self.file) for link in links)


def application(file: Path) -> Starlette:
    async def download(_: Request) -> Response:
        return FileResponse(file)

    async def large(_: Request) -> Response:
        return JSONResponse(["x" * 1024] * (LARGE // 1024))

    async def events(_: Request) -> Response:
        async def endless() -> AsyncIterator[str]:
            while True:
                yield f"data: {'x' * 4096}\n\n"
                await asyncio.sleep(0)  # or it would never be told that its reader is gone

        return StreamingResponse(endless(), media_type="text/event-stream")

    async def unread(_: Request) -> Response:
        return JSONResponse("I did not read that.")

    routes = [Route(f"/{handler.__name__}", handler, methods=["GET", "POST"])
              for handler in (download, large, events, unread)]  # fmt: skip
    return Starlette(routes=routes)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("connections") / "clip.mp4"
    file.write_bytes(bytes(LARGE))
    settings = dataclasses.replace(Settings(), upload_seconds=SECONDS, download_seconds=SECONDS)
    config = http_config(application(file), settings)
    config.room = ROOM
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield Running(server, listening.getsockname()[1], file)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listening.close()


@pytest.fixture(autouse=True)
def all_are_closed_in_the_end(running: Running) -> Iterator[None]:
    yield
    until(lambda: running.open == 0)


def until(done: Callable[[], bool], seconds: float = 20) -> float:
    """How long it took to come true."""
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - begin


def ask(path: str, more: str = "") -> bytes:
    return f"GET /{path} HTTP/1.1\r\nhost: localhost\r\n{more}\r\n".encode()


@pytest.mark.parametrize("path", ["download", "large", "events"])
def test_a_client_that_takes_nothing_of_its_answer_is_given_up(running: Running, path: str) -> None:
    with running.connect(little=True) as connection:
        connection.sendall(ask(path))
        connection.recv(1)  # the answer has begun, and is of no more interest
        if path == "download":
            until(running.holds_the_file)
        took = until(lambda: running.open == 0)
        assert 0.5 * SECONDS < took < 15
        until(lambda: not running.holds_the_file())
        with pytest.raises(ConnectionError):
            while connection.recv(2**20):
                pass
            raise ConnectionError("its end came unannounced")


def test_a_client_that_takes_a_byte_now_and_then_is_given_up_too(running: Running) -> None:
    with running.connect(little=True) as connection:
        connection.sendall(ask("download"))
        deadline = time.monotonic() + 15
        with contextlib.suppress(ConnectionError):
            while running.open and time.monotonic() < deadline:
                connection.recv(1)
                time.sleep(SECONDS / 10)
        assert running.open == 0


def test_a_client_that_closes_without_having_read_is_not_waited_for(running: Running) -> None:
    """An answer that is complete may still lie here, unsent: closing then waits for the client, in asyncio for ever."""
    with running.connect(little=True) as connection:
        connection.sendall(ask("large", "connection: close\r\n"))
        connection.recv(1)
        until(lambda: running.open == 0)


def test_a_slow_client_that_keeps_its_pace_gets_everything(running: Running) -> None:
    """Three times as slow as the deadline is long, in all."""
    with running.connect(little=True) as connection:
        connection.sendall(ask("download", "connection: close\r\n"))
        got = 0
        begin = time.monotonic()
        while part := connection.recv(2**18):
            got += len(part)
            time.sleep(max(0.0, begin + 3 * SECONDS * got / LARGE - time.monotonic()))
        assert got > LARGE and time.monotonic() - begin > 2.5 * SECONDS


def test_a_body_that_trickles_on_after_its_answer_is_given_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads it any more, so no deadline of a reader ends it, and each byte of it puts keep-alive's off."""
    monkeypatch.setattr(connections, "LATE_SECONDS", 0.2)
    assert LATE_SECONDS > 1  # in earnest: there the reader's own, which answers, comes first
    with running.connect() as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begin < 10:
                connection.sendall(b"x")
                time.sleep(SECONDS / 10)
        assert SECONDS / 2 < time.monotonic() - begin < 9


def test_a_connection_lives_on_after_a_body_that_came_in_time(running: Running) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as client:
        for _ in range(3):
            assert client.post("/unread", content=b"x" * 1000).status_code == 200
            time.sleep(SECONDS / 3)
        assert running.open == 1


def test_beyond_the_last_connection_served_others_are_told_so(running: Running) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(ROOM):
            held.enter_context(running.connect())
        until(lambda: running.open == ROOM)
        answer = httpx.get(f"http://127.0.0.1:{running.port}/unread")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("5", "close")
        assert answer.headers["x-content-type-options"] == "nosniff"
    until(lambda: running.open == 0)
    assert httpx.get(f"http://127.0.0.1:{running.port}/unread").status_code == 200


def test_a_flood_of_connections_that_say_nothing_takes_no_more_than_its_share(running: Running) -> None:
    """Each is a file descriptor, and without one no clip can be opened."""
    with contextlib.ExitStack() as held:
        for _ in range(ROOM + TURNED_AWAY + 50):
            held.enter_context(running.connect())
        time.sleep(SECONDS / 4)  # not so long that the served ones are given up
        assert ROOM <= running.open <= ROOM + TURNED_AWAY


def test_as_many_connections_are_served_as_there_are_files_for(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    room = http_config(application(Path()), Settings()).room
    assert set_to == [(4096, 4096)]
    assert room * FILES_EACH + KEPT_FILES <= 4096 and room > 1200


@pytest.mark.parametrize("sent", [b"\0\1\2\r\n\r\n", b"GET / HTTP/9\r\n\r\n", ask("unread", "content-length: -1\r\n"),
                                  ask("unread", "content-length: 1\r\ncontent-length: 2\r\n"),
                                  ask("unread", "host: other\r\n"), ask("unread", "x : y\r\n"),
                                  ask("unread", "x: a\0b\r\n"), ask("unread", "transfer-encoding: gzip, chunked\r\n")],
                         ids=range(8))  # fmt: skip
def test_what_is_no_http_is_refused_in_the_envelope(running: Running, sent: bytes) -> None:
    with running.connect() as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head.lower()
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_what_is_no_http_after_an_answer_ends_the_connection_and_nothing_else(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), running.connect() as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"-2\r\n{}\r\n0\r\n\r\n")
        assert connection.recv(65536) == b""
    assert not caplog.records
