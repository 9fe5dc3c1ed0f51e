"""What the endpoints work with, put together once."""

from __future__ import annotations

import contextlib
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

    Raises BlockingIOError where another server has the directory, OSError, ValueError or sqlite3.Error where it cannot
    be used.
    """
    storage = Storage(settings.data_dir)
    storage.prepare()
    with contextlib.ExitStack() as undo:
        lock = undo.enter_context(storage.lock())
        store = JobStore(storage.database)
        undo.callback(store.close)
        store.recover()
        storage.sweep(store.completed_ids())
        services = Services(settings, storage, store, Engine(settings, store, on_fatal), lock)
        undo.pop_all()
    return services


def _of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(_of)]
