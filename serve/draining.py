"""Stopping in order: the first SIGTERM or SIGINT lets the running job end, within a deadline; the second does not wait.

Meanwhile the server goes on answering: clients see their clip's end and can fetch it, and /readyz is 503.
"""

from __future__ import annotations

import logging
import threading
from types import FrameType

import uvicorn

from .services import Services

log = logging.getLogger("wan_serve")


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which stops accepting only once the engine is drained."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        if self._told:
            self._services.engine.drain_by = 0.0
            self._end()
            return
        self._told = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        seconds = self._services.settings.drain_seconds
        log.info("told to stop: the running job has %g s to end", seconds)
        self._services.engine.drain(seconds)
        self._end()

    def _end(self) -> None:
        self._services.engine.tell.hub.close()  # open event streams would hold the shutdown up
        self.should_exit = True
