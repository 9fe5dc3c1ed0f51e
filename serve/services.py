"""What the endpoints work with, put together once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from wan_runtime import Lora

from .engine import Engine
from .jobs import STATUSES, JobStore
from .keys import KeyRing
from .made_with import loras_of
from .settings import Settings
from .start_images import Intake, open_intake
from .storage import Storage
from .sweeper import Sweeper
from .uploads import Uploads

if TYPE_CHECKING:
    from .spans import Spans

FLUSH_SECONDS = (1.0, 5.0)  # at least and at most, for the last spans to reach their collector


class SpansRefused(Exception):
    """OpenTelemetry's SDK cannot be set up, for this reason."""


@dataclass(frozen=True)
class Services:
    """The parts of one running server."""

    settings: Settings
    storage: Storage
    store: JobStore
    engine: Engine
    sweeper: Sweeper
    lock: IO[str]
    intake: Intake
    keys: KeyRing | None = None
    spans: Spans | None = None
    recovered: Sequence[str] = ()  # jobs that the last server left running, and that have ended with it
    uploads: Uploads = field(default_factory=Uploads)
    # A key's limits hold only if nothing is added while they are looked at.
    creating: asyncio.Lock = field(default_factory=asyncio.Lock)
    started_at: float = field(default_factory=time.time)

    def loras(self, model: str) -> dict[str, Lora] | None:
        """The LoRAs that clients of a model may name now, or None where the operator has no folder of them."""
        settings = self.settings.models[model]
        return None if settings.lora_dir is None else loras_of(settings)

    def trace(self, request: Request) -> Mapping[str, str] | None:
        """The trace that a request belongs to, where spans are made and it names one."""
        if self.spans is None:
            return None
        from .spans import trace_of

        return trace_of(request.headers)

    def start(self) -> None:
        """Begins the work, and returns at once."""
        self.tell_recovered()
        self.engine.start()
        self.sweeper.start()

    def tell_recovered(self) -> None:
        """Tells whoever listens of the jobs that ended with the last server."""
        for job_id in self.recovered:
            self.engine.tell.end(job_id)

    def close(self) -> None:
        """Ends the worker, sends the last spans and gives the data directory back."""
        self.sweeper.stop()
        self.engine.stop()
        if self.spans is not None:
            least, most = FLUSH_SECONDS
            self.spans.close(min(max(self.engine.drain_by - time.monotonic(), least), most))
        self.store.close()
        self.lock.close()


def open_services(settings: Settings, on_fatal: Callable[[str], None]) -> Services:
    """Takes the data directory, brings its jobs and files to one truth, and prepares (not starts) the engine.

    Raises BlockingIOError where another server has the directory, OSError, ValueError or sqlite3.Error where it cannot
    be used, and SpansRefused.
    """
    keys = KeyRing(settings.api_keys) if settings.api_keys else None
    storage = Storage(settings.data_dir)
    storage.prepare()
    with contextlib.ExitStack() as undo:
        lock = undo.enter_context(storage.lock())
        store = JobStore(storage.database)
        undo.callback(store.close)
        recovered = store.recover(storage.size)
        with_id = {status: [job.id for job in store.with_status(status)] for status in STATUSES}
        storage.sweep(with_id.pop("completed"), itertools.chain(*with_id.values()))
        spans = _open_spans(settings)
        engine = Engine(settings, store, storage, on_fatal)
        if spans is not None:
            engine.tell.timeline.listeners.append(spans.ended)
        sweeper = Sweeper(settings, store, storage, engine.tell)
        intake = open_intake(settings.allow_image_host)
        services = Services(settings, storage, store, engine, sweeper, lock, intake, keys, spans, recovered)
        undo.pop_all()
    return services


def _open_spans(settings: Settings) -> Spans | None:
    if settings.otlp_endpoint is None:
        return None
    from .collector import open_provider
    from .otlp import traces_url
    from .spans import Spans

    try:
        return Spans(open_provider(traces_url(settings.otlp_endpoint)))
    except (ValueError, RuntimeError) as error:
        raise SpansRefused(str(error)) from error


async def _of(request: Request) -> Services:  # async, or each request would wait for a thread to do this
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(_of)]
