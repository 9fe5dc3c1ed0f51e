"""What happens to each job, as it happens, for the readers of `/v1/videos/{id}/events`.

The engine's thread publishes; any number of coroutines read. Events are kept for a while, so that a reader that lost
its connection gets what it missed; of previews only the last is kept, since they are large. Nothing here is the truth
about a job: that is its row, from which a reader starts whose last event is not known here (any more).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_JOBS = 256  # whose events are kept
MAX_EVENTS = 512  # of one job: 200 steps, the decoded chunks of 257 frames, and the rest
HANDFUL = 16  # readers of an event that are written to without a pause
LAST = ("done", "failed", "deleted")  # nothing comes after one of these


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job. Numbers rise, with gaps."""

    number: int
    name: str
    data: Mapping[str, Any]
    text: str  # as it goes to each of its readers, of whom there may be hundreds


def written(event_id: str, name: str, data: Mapping[str, Any]) -> str:
    """An event as it stands in a stream."""
    return f"id: {event_id}\nevent: {name}\ndata: {json.dumps(dict(data), separators=(',', ':'))}\n\n"


class Hub:
    """The events of all jobs. `publish` may be called from any thread, the rest from the event loop."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)  # ids of another server's life mean nothing to this one
        self.closed = False
        self._lock = threading.Lock()
        self._number = 0
        self._logs: OrderedDict[str, list[Event]] = OrderedDict()
        self._bells: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None

    def publish(self, job_id: str, name: str, data: Mapping[str, Any]) -> None:
        """Adds an event to a job's log and wakes its readers."""
        with self._lock:
            self._number += 1
            log = self._logs.setdefault(job_id, [])
            if name == "preview":
                log[:] = [event for event in log if event.name != "preview"]
            text = written(f"{self.epoch}-{self._number}", name, data)
            log.append(Event(self._number, name, data, text))
            del log[:-MAX_EVENTS]
            self._logs.move_to_end(job_id)
            while len(self._logs) > MAX_JOBS:
                self._logs.popitem(last=False)
        self._wake(job_id)

    def close(self) -> None:
        """Ends every reader: the server stops."""
        self.closed = True
        for job_id in list(self._bells):
            self._wake(job_id)

    def _wake(self, job_id: str) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its readers with it
                loop.call_soon_threadsafe(self._ring, job_id)

    def _ring(self, job_id: str) -> None:
        self._ring_all(list(self._bells.get(job_id, ())))

    def _ring_all(self, bells: list[asyncio.Event]) -> None:
        """A few at a time: between two handfuls of readers the loop serves whoever else has asked."""
        for bell in bells[:HANDFUL]:
            bell.set()
        if self._loop is not None and bells[HANDFUL:]:
            self._loop.call_soon(self._ring_all, bells[HANDFUL:])

    def read_jobs(self) -> list[str]:
        """The jobs whose events somebody reads now."""
        return list(self._bells)

    def after(self, job_id: str, number: int) -> list[Event]:
        """The kept events of a job that came after one of them."""
        with self._lock:
            return [event for event in self._logs.get(job_id, ()) if event.number > number]

    def newest(self) -> int:
        """The number of the last event of any job: whoever starts from a row now continues behind it."""
        with self._lock:
            return self._number

    def knows(self, event_id: str, job_id: str) -> int | None:
        """The number in a `Last-Event-ID` if every later event of the job is still kept, else None."""
        epoch, _, number = event_id.partition("-")
        if epoch != self.epoch or not (number.isascii() and number.isdigit() and len(number) < 16):
            return None
        with self._lock:
            log = self._logs.get(job_id)
            if int(number) > self._number:  # nothing would ever come after it
                return None
            return int(number) if log and (log[0].number <= int(number) or len(log) < MAX_EVENTS) else None

    @contextlib.contextmanager
    def reading(self, job_id: str) -> Iterator[asyncio.Event]:
        """A bell that rings (is set) when there may be something new of this job."""
        self._loop = asyncio.get_running_loop()
        bell = asyncio.Event()
        self._bells[job_id].add(bell)
        try:
            yield bell
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]
