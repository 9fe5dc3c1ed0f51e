"""Keeps one worker process alive and fed. A thread of the HTTP process does it, so that no request ever waits on it.

The thread owns the worker: it spawns it, gives it the oldest queued job whenever it is idle, writes what it reports
into the store, and, when it dies, fails the job it was on with the reason and starts another. A worker that cannot be
started is not tried for ever: the engine gives up and says why, and the server ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from wan_runtime import ClipProfile

from . import worker
from .jobs import Job, JobStore
from .settings import Settings

log = logging.getLogger("wan_serve")
MAX_STARTS = 4  # in a row that did not become ready
SPAWN = multiprocessing.get_context(
    "spawn"
)  # a forked child would inherit CUDA, locks and the listening socket


@dataclass(frozen=True)
class EngineState:
    """What the worker is doing, for readiness and for /v1/models. `profile` stays known while it restarts."""

    phase: str = "starting"
    profile: ClipProfile | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None
    step_seconds: float = 1.0

    @property
    def ready(self) -> bool:
        """Whether a job would be run now."""
        return self.phase == "ready"


class Engine:
    """The supervisor. `on_fatal` is called, from its thread, with the reason when it gives up."""

    def __init__(self, settings: Settings, store: JobStore, on_fatal: Callable[[str], None]) -> None:
        self.state = EngineState()
        self._settings, self._store, self._on_fatal = settings, store, on_fatal
        self._job: Job | None = None
        self._connection: Connection | None = None
        self._send_lock = threading.Lock()
        self._stopping = threading.Event()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._thread = threading.Thread(target=self._supervise, name="engine")

    def start(self) -> None:
        """Begins, and returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the worker, puts its job back into the queue, and waits until both are done."""
        self._stopping.set()
        self.wake()
        self._thread.join()
        self._wake_in.close()
        self._wake_out.close()

    def wake(self) -> None:
        """Says that there may be a new job."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes too
            self._wake_in.send(b"!")

    def cancel(self, job_id: str) -> None:
        """Asks the worker to give this job up at its next step. Nothing happens if it is on another."""
        job = self._job
        if job is not None and job.id == job_id:
            self._send({"do": "cancel", "job": job_id})

    def kill(self, job_id: str) -> None:
        """Kills the worker if it is still on this job: for one that does not answer a cancel."""
        job, pid = self._job, self.state.pid
        if job is not None and job.id == job_id and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _send(self, command: dict[str, Any]) -> None:
        with self._send_lock, contextlib.suppress(OSError):  # a dead worker is noticed by the supervisor
            if self._connection is not None:
                self._connection.send_bytes(json.dumps(command).encode())

    def _supervise(self) -> None:
        try:
            self._keep_alive()
        except Exception as error:
            log.exception("the engine failed")
            self._give_up(f"{type(error).__name__}: {error}")

    def _keep_alive(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            reached_ready, reason = self._one_worker()
            if self._stopping.is_set():
                return
            failures = 0 if reached_ready else failures + 1
            never_ready = self.state.profile is None
            if failures >= MAX_STARTS or (never_ready and reason.startswith("fatal: ")):
                self._give_up(reason.removeprefix("fatal: "))
                return
            log.error("the worker ended: %s; starting another", reason)
            self._stopping.wait(min(2.0**failures - 1, 30))

    def _give_up(self, reason: str) -> None:
        self.state = replace(self.state, phase="failed", pid=None)
        self._on_fatal(reason)

    def _one_worker(self) -> tuple[bool, str]:
        """One worker's life. Whether it was ever ready, and why it ended."""
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(
            target=worker.main, args=(theirs, self._settings, os.getpid()), name="wan-worker", daemon=True
        )
        process.start()
        theirs.close()
        with self._send_lock:
            self._connection = ours
        self.state = replace(self.state, phase="starting", pid=process.pid)
        reached_ready, fatal = self._attend(process, ours)
        self.state = replace(self.state, phase="stopping" if self._stopping.is_set() else "restarting")
        with self._send_lock:
            self._connection = None
            ours.close()  # its end of file also ends a worker that is still alive
        process.join(5 if self._stopping.is_set() else 30)
        if process.is_alive():
            process.kill()
            process.join()
        reason = f"fatal: {fatal}" if fatal else _how_it_ended(process.exitcode)
        self._settle(reason)
        self.state = replace(self.state, pid=None)
        process.close()
        return reached_ready, reason

    def _attend(self, process: BaseProcess, ours: Connection) -> tuple[bool, str | None]:
        """Feeds the worker and hears it until it ends or the engine stops."""
        reached_ready = False
        last_step = time.monotonic()
        while not self._stopping.is_set():
            if self.state.ready and self._job is None and (job := self._store.claim()):
                self._job = job
                self._send({"do": "generate", "job": job.id, "request": dict(job.request)})
                last_step = time.monotonic()
            heard = wait([ours, self._wake_out, process.sentinel])
            if self._wake_out in heard:
                self._wake_out.recv(4096)
            if ours in heard:
                try:
                    message = json.loads(ours.recv_bytes())
                except (EOFError, OSError):
                    break
                if message["event"] == "fatal":
                    return reached_ready, str(message["message"])
                if message.get("step"):
                    last_step = self._time_step(last_step)
                self._hear(message)
                reached_ready = reached_ready or self.state.ready
            elif process.sentinel in heard:
                break
        return reached_ready, None

    def _time_step(self, last: float) -> float:
        now = time.monotonic()
        seconds = 0.7 * self.state.step_seconds + 0.3 * (now - last)
        self.state = replace(self.state, step_seconds=seconds)
        return now

    def _hear(self, message: dict[str, Any]) -> None:
        event, job_id = message["event"], str(message.get("job", ""))
        if event == "ready":
            profile = ClipProfile(**message["profile"])
            self.state = replace(self.state, phase="ready", profile=profile, facts=message["facts"])
            log.info("ready: %s on %s", self._settings.model_name, message["facts"]["device"])
        elif event == "phase" and not job_id:
            self.state = replace(self.state, phase=message["phase"])
        elif event == "phase":
            self._store.progress(job_id, phase=message["phase"], step=message["step"])
        else:
            if event == "done":
                self._store.complete(job_id)
            elif event == "cancelled":
                self._store.fail(job_id, "cancelled", "The job was cancelled while it ran.")
            else:
                self._store.fail(job_id, message["code"], message["message"])
            self._job = None

    def _settle(self, reason: str) -> None:
        """What becomes of the job that the ended worker was on."""
        job, self._job = self._job, None
        if job is None:
            return
        if self._stopping.is_set():
            self._store.requeue(job.id)
            return
        now = self._store.get(job.id) or job
        steps = job.request["num_inference_steps"]
        self._store.fail(
            job.id,
            "worker_died",
            f"The worker process ended in the phase {now.phase!r}, after {now.step} of {steps} steps: {reason}. "
            "Another is being started; create the video again.",
        )


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it exited with the status {code}"


def profile_fields(profile: ClipProfile) -> dict[str, Any]:
    """A profile as plain data, for /v1/models."""
    return asdict(profile)
