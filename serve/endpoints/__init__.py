"""One router a file, found by being here: `endpoints/videos.py` holds `ENDPOINT = Endpoint(router)`."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter


@dataclass(frozen=True)
class Endpoint:
    """A group of routes that belong together. One that is not public needs a valid API key where keys are in use."""

    router: APIRouter
    public: bool = False
