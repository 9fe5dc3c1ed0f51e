"""A real `wan-serve` in its own process, on the bundled tiny model, and the real `openai` client."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

START_SECONDS = 300
# One thread: on a busy machine OpenMP's threads wait for each other many times longer than they work.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SOAK = "WAN_SOAK" in os.environ  # `make soak`: the same tests with their large counts
QUICK: dict[str, Any] = {"num_frames": 5, "width": 64, "height": 64, "num_inference_steps": 2}
SAME = 16  # of 255: on a CPU about one clip in forty differs a little from another of the same request (docs/log.md)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Takes back the log that a command set up which ran in this process: its stream is closed with the test."""
    log = logging.getLogger()
    handlers, level = log.handlers[:], log.level
    yield
    log.handlers[:] = handlers
    log.setLevel(level)


def same_clip(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two clips, frames as signed integers, are of the same request."""
    return one.shape == other.shape and int(np.abs(one - other).max()) <= SAME


@dataclass(frozen=True)
class Server:
    """A running server: its process, its address and its log."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    data_dir: Path

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **options)

    def aclient(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def worker(self) -> int:
        """The worker's process id: the child that runs multiprocessing's spawn."""
        for child in children(self.process.pid):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        raise AssertionError("the server has no worker")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def wait_ready(self) -> None:
        wait_for(lambda: self.get("/readyz").status_code == 200, "the worker to be ready", self)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
        for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(done: Callable[[], object], what: str, server: Server | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not done():
        log = server.log.read_text() if server else ""
        assert server is None or server.process.poll() is None, f"the server ended:\n{log}"
        assert time.monotonic() < deadline, f"waited {START_SECONDS} s for {what}\n{log}"
        time.sleep(0.05)


def talk(server: Server, request: bytes, *, seconds: float = 10) -> bytes:
    """The whole answer to raw bytes, or what came until the server closed."""
    with socket.create_connection(server.address, timeout=seconds) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
            if b"\r\n\r\n" in b"".join(parts) and b"HTTP/1.1 100" not in parts[0]:
                break
        return b"".join(parts)


def start(data_dir: Path, *options: str, **environment: str) -> Server:
    """A server that has bound its port; the worker may still be loading."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "server.log"
    command = [
        sys.executable,
        "-m",
        "wan_runtime.serve",
        "--port",
        "0",
        "--data-dir",
        str(data_dir),
        *options,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**ENVIRONMENT, **environment}
        )
    server = Server(process, "", log, data_dir)
    address = re.compile(r"listening on (http://\S+),")
    wait_for(lambda: address.search(log.read_text()), "the server to bind its port", server)
    match = address.search(log.read_text())
    assert match is not None
    server = replace(server, url=match[1])

    def answers() -> bool:
        try:
            return server.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(answers, "the server to answer", server)
    return server


@contextmanager
def running(data_dir: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A server for a while. It is killed at the end if it has not been stopped."""
    server = start(data_dir, *options, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("serve")) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
