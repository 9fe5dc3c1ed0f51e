"""What the endpoints work with, put together once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Annotated

from fastapi import Depends, Request

from .engine import Engine
from .jobs import JobStore
from .settings import Settings
from .storage import Storage


@dataclass(frozen=True)
class Services:
    """The parts of one running server."""

    settings: Settings
    storage: Storage
    store: JobStore
    engine: Engine
    lock: IO[str]
    started_at: float = field(default_factory=time.time)

    def close(self) -> None:
        """Ends the worker and gives the data directory back."""
        self.engine.stop()
        self.store.close()
        self.lock.close()


def open_services(settings: Settings, on_fatal: Callable[[str], None]) -> Services:
    """Takes the data directory, brings its jobs and files to one truth, and prepares (not starts) the engine.

    Raises BlockingIOError where another server has the directory, OSError where it cannot be written.
    """
    storage = Storage(settings.data_dir)
    storage.prepare()
    lock = storage.lock()
    store = JobStore(storage.database)
    store.recover()
    storage.sweep(store.completed_ids())
    return Services(settings, storage, store, Engine(settings, store, on_fatal), lock)


def _of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(_of)]
