"""Keeps one worker process alive and fed. A thread of the HTTP process does it, so that no request ever waits on it.

The thread owns the worker: it spawns it, gives it the oldest queued job whenever it is idle, writes what it reports
into the store and to the readers of events, and kills it when it hangs. When it ends, its job is begun once more or
fails with the reason, and another is started. A worker that cannot be started is not tried for ever: the engine gives
up and says why, and the server ends.
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
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from . import costs, worker
from .counters import SIZE, Counters
from .endings import fail_cancelled, fail_unserved, how_it_ended, settle
from .forecast import Forecast
from .jobs import Job, JobStore
from .made_with import made_with
from .settings import Settings
from .state import EngineState
from .storage import Storage
from .telling import Teller

log = logging.getLogger("wan_serve")
MAX_STARTS = 4  # in a row that did not become ready
LOOK_SECONDS = 1.0  # between two looks at whether the worker still gets on
END_SECONDS = 5.0  # for a worker that has closed its pipe to end, and its status to tell why
# a forked child would inherit CUDA, locks and the listening socket
SPAWN = multiprocessing.get_context("spawn")


class Engine:
    """The supervisor. `on_fatal` is called, from its thread, with the reason when it gives up."""

    def __init__(
        self, settings: Settings, store: JobStore, storage: Storage, on_fatal: Callable[[str], None]
    ) -> None:
        self.state = EngineState()
        self.draining = False
        self.drain_by = 0.0  # on the monotonic clock
        self._settings, self._store, self._storage, self._on_fatal = settings, store, storage, on_fatal
        self.forecast = Forecast(store, lambda: self.state)
        self.tell = Teller(store, self.forecast, lambda: self.state)
        self._job: Job | None = None
        self._unwanted: set[str] = set()  # jobs that were cancelled while they ran
        self._connection: Connection | None = None
        self._send_lock = threading.Lock()
        self._stopping = threading.Event()
        self._drained = threading.Event()
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
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        self._wake_in.close()
        self._wake_out.close()

    def drain(self, seconds: float) -> None:
        """Takes no more jobs, and waits until the running one has ended, or for so many seconds."""
        self.draining = True
        self.wake()
        self.drain_by = time.monotonic() + seconds
        while time.monotonic() < self.drain_by and self.state.pid is not None and not self._drained.wait(0.1):
            pass

    def wake(self) -> None:
        """Says that there may be a new job."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes too
            self._wake_in.send(b"!")

    def cancel(self, job_id: str) -> None:
        """Asks the worker to give this job up at its next step. Nothing happens if it is on another."""
        job = self._job
        if job is not None and job.id == job_id and job_id not in self._unwanted:
            self._unwanted.add(job_id)
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

    def _enter(self, phase: str) -> None:
        self.state = replace(self.state, phase=phase)
        self.tell.entered(phase)

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
            never_ready = len(self.state.models) < len(self._settings.models)
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
        shared = SPAWN.RawArray("Q", SIZE)
        process = SPAWN.Process(
            target=worker.main, name="wan-worker", daemon=True,
            args=(theirs, self._settings, self._to_load(), os.getpid(), shared),
        )  # fmt: skip
        process.start()
        theirs.close()
        self.state = replace(self.state, pid=process.pid, counters=Counters(shared))
        self._enter("starting")
        self._connection = ours
        reason: str | None = None
        try:
            reached_ready, reason = self._attend(process, ours)
        finally:
            with self._send_lock:
                self._connection = None
            if not self._stopping.is_set() and reason is None:
                process.join(END_SECONDS)
            process.kill()
            process.join()
            ours.close()
        reason = reason or how_it_ended(process.exitcode)
        self.state = replace(self.state, pid=None)
        self._enter("restarting")
        self._settle(reason)
        process.close()
        return reached_ready, reason

    def _to_load(self) -> list[str]:
        """The models that a new worker loads in turn: those that nobody has seen yet, so that one that cannot be loaded
        is found out at the start, and last, to be kept, that of the next job."""
        waiting, models = self._store.next(), self._settings.models
        wanted = (
            waiting.model if waiting is not None and waiting.model in models else self._settings.model_name
        )
        unseen = [name for name in models if name not in self.state.models and name != wanted]
        return [*unseen, wanted]

    def _attend(self, process: BaseProcess, ours: Connection) -> tuple[bool, str | None]:
        """Feeds the worker and hears it until it ends, hangs, or the engine stops."""
        reached_ready = False
        moved, seen = time.monotonic(), self.state.counters.read()
        while not self._stopping.is_set():
            if self._feed():
                moved = time.monotonic()
            heard = wait([ours, self._wake_out, process.sentinel], LOOK_SECONDS)
            now = self.state.counters.read()
            if now != seen or ours in heard:
                moved, seen = time.monotonic(), now
            if self._wake_out in heard:
                self._wake_out.recv(4096)
            if ours in heard:
                try:
                    message = json.loads(ours.recv_bytes())
                except (EOFError, OSError):
                    break
                if message["event"] in ("fatal", "broken"):
                    kind = "fatal: " if message["event"] == "fatal" else ""
                    return reached_ready, kind + str(message["message"])
                self._hear(message)
                reached_ready = reached_ready or message["event"] == "ready"
            elif process.sentinel in heard:
                break
            elif self._job is not None and time.monotonic() - moved > self._settings.stall_seconds:
                return reached_ready, f"it did nothing for {time.monotonic() - moved:.0f} s and was killed"
        return reached_ready, None

    def _feed(self) -> bool:
        """Gives an idle worker the oldest job, if there is one. Whether it did."""
        if self.draining:
            if self.state.phase != "draining":
                self._enter("draining")
            if self._job is None:
                self._drained.set()
            return False
        if self._job is not None or not self.state.ready:
            return False
        waiting = self._store.next()
        if waiting is None:
            return False
        if waiting.model not in self._settings.models:
            fail_unserved(self._store, waiting)
            self.tell.end(waiting.id)
            return False
        if waiting.model != self.state.model:
            self.state = replace(self.state, model=waiting.model)
            self._enter("loading")
            self._send({"do": "load", "model": waiting.model})
            return True
        facts = self.state.models[waiting.model].facts
        made = made_with(self._settings.models[waiting.model], facts, waiting.request)
        job = self._store.claim(made, only=waiting.id)
        if job is None:  # it was cancelled meanwhile
            return False
        self._job = job
        self._send({"do": "generate", "job": job.id, "request": dict(job.request), "made_with": made})
        self.tell.queue()
        return True

    def _hear(self, message: dict[str, Any]) -> None:
        event, job_id = message["event"], str(message.get("job", ""))
        if event == "known":
            self.state = self.state.met(message)
        elif event == "ready":
            self._enter("ready")
            log.info("ready: %s", self.state.model)
        elif event == "phase" and not job_id:
            self.state = replace(self.state, model=message.get("model", self.state.model))
            self._enter(message["phase"])
        elif event == "phase":
            self._store.progress(job_id, phase=message["phase"], step=message["step"])
            self.tell.progress(job_id, message["phase"])
        elif event == "preview":
            self.tell.hub.publish(job_id, "preview", {name: message[name] for name in ("step", "image")})
        else:
            self._end(job_id, event, message)

    def _end(self, job_id: str, event: str, message: dict[str, Any]) -> None:
        if event == "done":
            row = self._store.complete(job_id, size=message["size"])
            self.state = replace(self.state, weighed=message["memory"])
            self._learn(job_id)
        elif event == "cancelled":
            row = fail_cancelled(self._store, job_id)
        else:
            row = self._store.fail(job_id, message["code"], message["message"])
        self._job = None
        self._unwanted.discard(job_id)
        self.tell.end(job_id, row)

    def _learn(self, job_id: str) -> None:
        """Corrects the predictions by what a job took."""
        job = self._store.get(job_id)
        known = self.state.models.get(job.model) if job is not None else None
        if job is None or known is None or job.started_at is None or job.completed_at is None:
            return
        predicted = self.forecast.seconds(job.request, job.model)
        correction = costs.learned(known.speed, predicted, job.completed_at - job.started_at)
        self.state = self.state.corrected(job.model, correction)

    def _settle(self, reason: str) -> None:
        """What becomes of the job that the ended worker was on."""
        job, self._job = self._job, None
        now = self._store.get(job.id) if job is not None else None
        if now is None:
            return
        unwanted = now.id in self._unwanted
        self._unwanted.discard(now.id)
        stopping = self._stopping.is_set()
        settle(self._store, self._storage, now, reason, unwanted=unwanted, stopping=stopping)
        self.tell.end(now.id)
