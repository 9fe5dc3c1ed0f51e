"""A crowd of clients on a server while a job runs: `python benchmarks/load.py [--pollers 1000] [--readers 200]`.

Starts `wan-serve` on the tiny model with one thread of arithmetic, gives it one long job and some that wait, and
measures in turns, on the same job: nobody asks; everybody does. Pollers ask for one job's status over a connection kept
open, as often as the server advises (`openai-poll-after-ms`) or every `--every` seconds; readers hold an event stream
of the running job. Told are the times to answer, the time of a denoising step with and without the crowd, and what
other processes took of the machine meanwhile. The crowd itself runs on the same cores.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

STEPS = 200
SETTLE_SECONDS = 6  # until all are connected and have found their interval
PROMPT = "a large red circle moving right on a black background"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DRAW = random.Random(3)
console = Console(stderr=True)


@dataclass
class Crowd:
    """What the clients of one loaded window saw. Times in seconds."""

    answers: list[float] = field(default_factory=list)
    windows: list[list[float]] = field(default_factory=list)  # those of each loaded window
    events: int = 0
    failed: int = 0


class Asker(asyncio.Protocol):
    """One connection that asks for one address at a time; no parsing beyond what the length needs."""

    def __init__(self) -> None:
        self.buffer = b""
        self.answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or self.answer is None:
            return
        length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
        if len(body) >= length:
            self.buffer = b""
            self.answer.set_result(head)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError("closed"))

    async def ask(self, request: bytes) -> bytes:
        """Sends the request, and gives the head of its answer."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)  # type: ignore[attr-defined]
        return await self.answer


def request_of(path: str, port: int) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer x\r\n\r\n".encode()


async def poll(port: int, job: str, every: float | None, crowd: Crowd) -> None:
    """One poller. Like the openai client it takes the interval from its first answer."""
    _, asker = await asyncio.get_running_loop().create_connection(Asker, "127.0.0.1", port)
    request, wait = request_of(f"/v1/videos/{job}", port), every
    try:
        while True:
            await asyncio.sleep(DRAW.random() * (wait or 5) if not asker.answer else wait or 1)
            begun = time.perf_counter()
            head = await asker.ask(request)
            crowd.answers.append(time.perf_counter() - begun)
            crowd.failed += b" 200 " not in head[:16]
            advised = re.search(rb"openai-poll-after-ms: (\d+)", head)
            wait = wait or (int(advised[1]) / 1000 if advised else 1)
    except ConnectionError:
        crowd.failed += 1
    finally:
        asker.transport.close()


async def listen(port: int, job: str, crowd: Crowd) -> None:
    """One reader of events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_of(f"/v1/videos/{job}/events", port))
        while data := await reader.read(65536):
            crowd.events += data.count(b"event: ")
        crowd.failed += 1  # the job goes on, so the stream must
    finally:
        writer.close()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server that is ready, and its port."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "wan_runtime.serve", "--port", "0", "--data-dir", str(folder)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    try:
        while not (match := re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{log.read_text()}")
            time.sleep(0.1)
        port = int(match[1])
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield process, port
    finally:
        process.send_signal(9)
        process.wait()


def cpu_of(pid: int) -> float:
    """A process's own processor seconds, and those of its children that live."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_busy() -> float:
    """Processor seconds that were spent on this machine, by anybody."""
    user, nice, system, _idle, _wait, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Window:
    """One stretch of time on a running job: the median time of a step, and what ran, in cores."""

    step_ms: float
    steps: int
    server: float
    worker: float
    clients: float
    others: float


class Meter:
    """Step times and processor time between two looks. Steps are timed by their events, as they arrive here."""

    def __init__(self, server: int, worker: int) -> None:
        self.pids = {"server": server, "worker": worker, "clients": os.getpid()}
        self.steps: list[float] = []

    async def hear(self, port: int, job: str) -> None:
        """Notes when each step of a job is told."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request_of(f"/v1/videos/{job}/events", port))
            while line := await reader.readline():
                if line == b"event: step\n":
                    self.steps.append(time.perf_counter())
        finally:
            writer.close()

    def look(self) -> dict[str, float]:
        """Processor seconds until now."""
        spent = {name: cpu_of(pid) for name, pid in self.pids.items()}
        return {"time": time.perf_counter(), "busy": machine_busy(), **spent}

    async def over(self, seconds: float) -> Window:
        """What happens in the next `seconds`."""
        self.steps.clear()
        before = self.look()
        await asyncio.sleep(seconds)
        after = self.look()
        took = after["time"] - before["time"]
        rate = {name: (after[name] - before[name]) / took for name in before if name != "time"}
        others = rate["busy"] - sum(rate[name] for name in self.pids)
        times = [later - earlier for earlier, later in itertools.pairwise(self.steps)]
        return Window(
            step_ms=1000 * statistics.median(times),
            steps=len(times),
            others=max(others, 0.0),
            **{name: rate[name] for name in self.pids},
        )


@dataclass
class Plan:
    """What is asked of the benchmark."""

    pollers: int
    readers: int
    waiting: int
    rounds: int
    seconds: float
    every: float | None
    size: str


def create(port: int, size: str, steps: int) -> str:
    body = {"prompt": PROMPT, "size": size, "num_frames": 33, "num_inference_steps": steps, "seed": 1}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/videos", json=body, timeout=60)
    return str(answer.raise_for_status().json()["id"])


async def measure(server: int, port: int, plan: Plan) -> tuple[list[Window], list[Window], Crowd]:
    """The idle windows, the loaded ones, and what the crowd saw in them. Each round has a job of its own."""
    worker = httpx.get(f"http://127.0.0.1:{port}/v1/models/wan-tiny").json()["worker"]["pid"]
    meter, crowd = Meter(server, worker), Crowd()
    idle, loaded = [], []
    for _ in range(plan.rounds):
        jobs = [create(port, plan.size, STEPS), *(create(port, plan.size, 2) for _ in range(plan.waiting))]
        tasks = [asyncio.create_task(meter.hear(port, jobs[0]))]
        while len(meter.steps) < 3:
            await asyncio.sleep(0.1)
        idle.append(await meter.over(plan.seconds))
        tasks += [asyncio.create_task(listen(port, jobs[0], crowd)) for _ in range(plan.readers)]
        for number in range(plan.pollers):
            tasks.append(asyncio.create_task(poll(port, jobs[number % len(jobs)], plan.every, crowd)))
        await asyncio.sleep(min(SETTLE_SECONDS, plan.seconds))
        begin = len(crowd.answers)
        loaded.append(await meter.over(plan.seconds))
        crowd.windows.append(crowd.answers[begin:])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in reversed(jobs):
            await asyncio.to_thread(httpx.delete, f"http://127.0.0.1:{port}/v1/videos/{job}", timeout=60)
        meter.steps.clear()
    return idle, loaded, crowd


def summary(idle: list[Window], loaded: list[Window], crowd: Crowd, plan: Plan) -> dict[str, Any]:
    """The figures: milliseconds, answers a second, cores. Of windows: the median, then each one."""
    told: dict[str, Any] = {
        "answers_a_second": round(sum(map(len, crowd.windows)) / plan.seconds / plan.rounds)
    }
    for share in (50, 95, 99):
        each = [round(1000 * percentile(answers, share), 1) for answers in crowd.windows]
        told[f"p{share}_ms"] = [statistics.median(each), each]
    told |= {"events": crowd.events, "failed": crowd.failed}
    lost = [100 * (1 - b.step_ms / a.step_ms) for b, a in zip(idle, loaded, strict=True)]
    told["rate_lost_percent"] = [round(statistics.median(lost), 1), [round(share, 1) for share in lost]]
    for name, windows in (("idle", idle), ("loaded", loaded)):
        for part in ("step_ms", "server", "worker", "clients", "others"):
            each = [round(getattr(window, part), 2) for window in windows]
            told[f"{name}_{part}"] = [statistics.median(each), each]
    return told


def percentile(values: list[float], share: int) -> float:
    """The value that `share` percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * share // 100, len(ordered) - 1)]


def main(
    pollers: Annotated[int, typer.Option(min=1)] = 1000,
    readers: Annotated[int, typer.Option(min=0)] = 200,
    waiting: Annotated[int, typer.Option(help="Jobs that wait; the pollers are spread over all.")] = 20,
    rounds: Annotated[int, typer.Option(help="Pairs of an idle and a loaded window.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each window.")] = 10,
    every: Annotated[
        float | None, typer.Option(help="Seconds between two polls; else as the server advises.")
    ] = None,
    size: Annotated[str, typer.Option(help="Of the clip: decides how long a step takes.")] = "128x128",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Times the server under a crowd."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    plan = Plan(pollers, readers, waiting, rounds, seconds, every, size)
    with tempfile.TemporaryDirectory(prefix="wan-load-") as folder, serving(Path(folder)) as (server, port):
        told = summary(*asyncio.run(measure(server.pid, port, plan)), plan)
    if as_json:
        print(json.dumps(told))
        return
    table = Table("figure", "value")
    for name, value in told.items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
