"""The log, as text or as JSON: a line names the request and the job that it is about, wherever it is written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

FORMATS = ("text", "json")
TEXT = "%(asctime)s %(name)s %(levelname)s %(message)s"
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


class _About(logging.Filter):
    """Puts the two ids on a record, where there are any."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (("request_id", _request_id.get()), ("job_id", _job_id.get())):
            if value is not None:
                setattr(record, name, value)
        return True


def configure(level: str, form: str) -> None:
    """Sends this process's log to the standard error stream, from `level` on: text, or a JSON object a line.

    An object has `timestamp` (ISO 8601, UTC), `level`, `logger` and `message`; `request_id` and `job_id` where the line
    is about one; `exc_info`, a traceback, where there was an error.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_About())
    handler.setFormatter(_json() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)  # whatever a library has set up
    if form == "json":
        logging.captureWarnings(True)


def adopt() -> None:
    """Imports the libraries that log by handlers of their own, and sends what they say through this log."""
    import torch
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for theirs in (of_diffusers, of_transformers):
        theirs.disable_default_handler()
        theirs.enable_propagation()
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] == torch.__name__ and isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def _json() -> logging.Formatter:
    names = {"levelname": "level", "name": "logger"}
    return JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=names, timestamp=True)


@contextlib.contextmanager
def about(*, request: str | None = None, job: str | None = None) -> Iterator[None]:
    """Lines written in the block, by this task or thread, are about this request or job."""
    set_to = [(kept, kept.set(value)) for kept, value in ((_request_id, request), (_job_id, job)) if value]
    try:
        yield
    finally:
        for kept, token in set_to:
            kept.reset(token)
