"""When each phase of a job began and ended, for what is kept of jobs: metrics and spans.

A job waits (`queued`; `loading` while the worker could take no job, since a model was loaded or a worker started), then
`text`, `denoise`, `decode` and `encode` follow each other. A job whose worker died waits again and goes through them
once more. What happened before this server started is not known here, and is in no phase.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .jobs import Job

RUNNING = ("text", "denoise", "decode", "encode")
WAITING = ("ready", "draining")  # the worker's phases in which it is not the model that a job waits for
KEPT = 4096  # changes between the two ways to wait; jobs that waited through more of them lose the first


@dataclass(frozen=True)
class Phase:
    """One phase of a job, in seconds since the epoch, and the code of the error that ended it, if one did."""

    name: str
    begin: float
    end: float
    error: str | None = None


Ended = Callable[[Job, Sequence[Phase]], None]  # is told of a job, done or failed, and its phases in order


@dataclass
class _Run:
    """A job that has been begun: its phases that are over, and the one that it is in, or None while it waits again."""

    since: float
    now: str | None = None
    over: list[Phase] = field(default_factory=list)

    def change(self, at: float, name: str | None, error: str | None = None) -> None:
        if self.now is not None:
            self.over.append(Phase(self.now, self.since, max(self.since, at), error))
        self.now, self.since = name, max(self.since, at)


class Timeline:
    """Follows all jobs, and tells `listeners` of each one's phases when it has ended. Any thread may report."""

    def __init__(self) -> None:
        self.listeners: list[Ended] = []
        self._lock = threading.Lock()
        self._waits = deque([(time.time(), "loading")], maxlen=KEPT)  # the way to wait, from each moment on
        self._runs: dict[str, _Run] = {}

    def entered(self, phase: str) -> None:
        """The worker has come to one of its own phases."""
        name = "queued" if phase in WAITING else "loading"
        with self._lock:
            if name != self._waits[-1][1]:
                self._waits.append((time.time(), name))

    def heard(self, job: Job, name: str) -> None:
        """A job has come to a phase of RUNNING, has ended (`done`, `failed`), or has gone back into the queue."""
        now = time.time()
        if name in ("done", "failed"):
            phases = self._end(job, job.completed_at or now)
            for listener in self.listeners:
                listener(job, phases)
            return
        with self._lock:
            run = self._runs.get(job.id)
            if name in RUNNING:
                run = run or self._runs.setdefault(job.id, _Run(job.created_at))
                if run.now is None:
                    self._begin(run, job.started_at or now)
                if run.now != name:
                    run.change(now, name)
            elif run is not None and name in ("queued", "loading"):
                run.change(now, None, "worker_died")

    def _end(self, job: Job, end: float) -> Sequence[Phase]:
        with self._lock:
            run = self._runs.pop(job.id, None) or _Run(job.created_at)
            if run.now is None:
                if job.started_at is None:
                    run.over += self._waited(run.since, end)
                elif (
                    job.started_at >= self._waits[0][0]
                ):  # begun by this server, and ended before it said a word
                    self._begin(run, job.started_at)
            run.change(end, None, job.error_code)
        return run.over

    def _begin(self, run: _Run, at: float) -> None:
        run.over += self._waited(run.since, at)
        run.change(at, "text")

    def _waited(self, begin: float, end: float) -> list[Phase]:
        """What a job waited for between two moments."""
        waits = itertools.pairwise([*self._waits, (max(begin, end), "")])
        spans = [(name, max(at, begin), min(until, end)) for (at, name), (until, _) in waits]
        return [Phase(name, first, last) for name, first, last in spans if first < last]
