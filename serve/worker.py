"""The process that holds the model. It loads, warms up, makes clips, and reports every phase and step over a pipe.

It talks JSON, never pickle. It dies with its parent in two ways, since either alone can fail: the kernel's parent-death
signal, and the end of the pipe. A cancel arrives on the same pipe while a clip is being made and is obeyed at the next
denoising step, between decoded chunks, and before the file is written.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping, MutableSequence
from multiprocessing.connection import Connection
from typing import Any

from . import logs
from .counters import Counters
from .made_with import loras_of
from .making import Bench, Cancelled, free, make, note_memory
from .memory import Memory
from .previews import fit
from .settings import Settings
from .storage import Storage

log = logging.getLogger("wan_serve.worker")
PR_SET_PDEATHSIG = 1


class Line:
    """The pipe to the HTTP process: a thread reads its commands, any thread may tell it something."""

    def __init__(self, connection: Connection, counters: Counters) -> None:
        self.jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._connection, self._counters = connection, counters
        self._lock = threading.Lock()
        self._cancelled: dict[str, int] = {}  # and the count of steps when that was heard
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def tell(self, event: str, **data: Any) -> None:
        """Reports an event."""
        with self._lock:
            self._connection.send_bytes(json.dumps({"event": event, **data}).encode())

    def check(self, job_id: str) -> None:
        """Raises Cancelled if this job is not wanted any more."""
        if job_id in self._cancelled:
            raise Cancelled

    def steps_when_cancelled(self, job_id: str) -> int:
        """How many steps this process had done when it was told to give the job up."""
        return self._cancelled.pop(job_id)

    def _read(self) -> None:
        while True:
            try:
                command = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the server is gone, and with it whoever wanted what this process is doing
            if command["do"] != "cancel":
                self.jobs.put(command)
            else:
                self._cancelled.setdefault(command["job"], self._counters.read()["steps"])


def main(
    connection: Connection, settings: Settings, order: list[str], parent: int, shared: MutableSequence[int]
) -> None:
    """The process, from start to its parent's end. `order` names the models that it loads in turn, to keep the last.

    `shared` holds its counters.
    """
    _die_with(parent)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they reach the whole group; the server decides what they mean
        signal.signal(number, signal.SIG_IGN)
    logs.configure(settings.log_level, settings.log_format)
    counters = Counters(shared)
    line = Line(connection, counters)
    line.tell("phase", phase="importing")
    logs.adopt()
    *others, name = order
    for other in others:  # looked at once, and let go of before the next: two models seldom fit
        _loaded(line, counters, settings.models[other])
    while True:
        name = _work_with(line, _loaded(line, counters, settings.models[name]))


def _work_with(line: Line, bench: Bench) -> str:
    """Makes clips with one model until another is wanted: the name of that."""
    line.tell("ready")
    while (command := line.jobs.get())["do"] == "generate":
        with logs.about(job=command["job"]):
            _work(line, bench, command)
    return str(command["model"])


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(0)


def _loaded(line: Line, counters: Counters, settings: Settings) -> Bench:
    """A model, loaded, used once, and told about. Ends the process, with the reason told, where that fails."""
    try:
        from . import warming

        line.tell("phase", phase="loading", model=settings.model_name)
        warming.make_room()
        pipe = warming.load(settings)
        line.tell("phase", phase="warming")
        told = warming.warm(pipe, settings)
        previews = fit(pipe)
        note_memory(counters)
    except Exception as error:
        from wan_runtime import WanRuntimeError

        if not isinstance(error, (WanRuntimeError, OSError)):
            log.exception("the model could not be prepared")
        line.tell("fatal", message=f"{type(error).__name__}: {error}")
        sys.exit(1)
    line.tell("known", model=settings.model_name, **told)
    return Bench(
        pipe, Storage(settings.data_dir), counters, line.tell, line.check, previews, settings.embed_metadata,
        lambda: loras_of(settings), told["memory"] and Memory(**told["memory"]),
    )  # fmt: skip


def _work(line: Line, bench: Bench, command: Mapping[str, Any]) -> None:
    """One job; whatever happens, exactly one of done, cancelled or failed is told."""
    job_id = command["job"]
    outcome = make(bench, job_id, command["request"], command["made_with"])
    data = dict(outcome.data)
    if outcome.event == "cancelled":
        later = bench.counters.read()["steps"] - line.steps_when_cancelled(job_id)
        log.info("%s was cancelled: it stopped %d steps after this process was told", job_id, later)
    if data.get("code") != "out_of_memory":
        line.tell(outcome.event, job=job_id, **data)
        return
    line.tell(
        "phase", phase="checking"
    )  # first: no other job is to come until the model has shown that it works
    line.tell(outcome.event, job=job_id, **data)
    _check_health(line, bench)


def _check_health(line: Line, bench: Bench) -> None:
    """After memory ran out: a small clip decides whether this process can go on. If not, another takes its place."""
    from .warming import try_out

    try:
        try_out(bench.pipe)
    except Exception as error:
        log.error("the model does not work after memory ran out (%s): another worker is to be started", error)
        line.tell(
            "broken",
            message=f"it failed a health check after memory ran out: {type(error).__name__}: {error}",
        )
        sys.exit(1)
    free(bench.pipe)
    log.info("the model works after memory ran out: this process goes on")
    line.tell("phase", phase="ready")
