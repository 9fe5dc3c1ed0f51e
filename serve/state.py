"""What the engine knows of its worker, in one frozen record that every thread may read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from wan_runtime import ClipProfile

from .costs import Speed
from .counters import NAMES, Counters


@dataclass(frozen=True)
class EngineState:
    """What the worker is doing, for readiness and for /v1/models. `profile` stays known while it restarts."""

    phase: str = "starting"
    profile: ClipProfile | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None
    speed: Speed | None = None
    counters: Counters = field(default_factory=lambda: Counters([0] * len(NAMES)))

    @property
    def ready(self) -> bool:
        """Whether a job would be run now."""
        return self.phase == "ready"


def profile_fields(profile: ClipProfile) -> dict[str, Any]:
    """A profile as plain data, for /v1/models."""
    return asdict(profile)
