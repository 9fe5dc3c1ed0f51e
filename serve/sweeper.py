"""Removes finished jobs by age, and clips by how much all of them take. A job's row goes first, then its files.

Where the server is killed between the two, the files belong to nobody, and go when it starts again.
"""

from __future__ import annotations

import logging
import threading
import time

from .jobs import Job, JobStore
from .settings import Settings
from .storage import Storage
from .telling import Teller

log = logging.getLogger("wan_serve")


class Sweeper:
    """A thread that looks every `sweep_seconds`."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, tell: Teller) -> None:
        self._settings, self._store, self._storage, self._tell = settings, store, storage, tell
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begins, and returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, and waits until it has."""
        self._stopping.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _work(self) -> None:
        while not self._stopping.wait(self._settings.sweep_seconds):
            try:
                self.sweep(time.time())
            except Exception:
                log.exception("sweeping failed; it is tried again in %g s", self._settings.sweep_seconds)

    def sweep(self, now: float) -> None:
        """Removes what is too old at `now` (seconds since the epoch), then the oldest of what is too much."""
        finished = self._store.finished()
        total = sum(job.bytes for job in finished)
        for job in finished:
            ends = expires_at(job, self._settings)
            if (ends is not None and ends <= now) or (job.bytes and self._is_too_much(total)):
                total -= job.bytes
                self._remove(job)

    def _is_too_much(self, total: int) -> bool:
        limit = self._settings.keep_gib
        return limit > 0 and total > limit * 2**30

    def _remove(self, job: Job) -> None:
        if self._store.delete(job.id, unless="in_progress"):
            self._storage.delete(job.id)
            self._tell.deleted(job.id)
            log.info("%s was removed: it was too old, or the clips too many", job.id)


def expires_at(job: Job, settings: Settings) -> float | None:
    """When a finished job will be removed for its age, in seconds since the epoch."""
    if job.completed_at is None or settings.keep_days == 0:
        return None
    return job.completed_at + settings.keep_days * 86400
