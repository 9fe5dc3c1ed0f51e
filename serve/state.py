"""What the engine knows of its worker, in one frozen record that every thread may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wan_runtime import ClipProfile

from .costs import Speed
from .counters import SIZE, Counters
from .memory import Memory


@dataclass(frozen=True)
class Known:
    """What is known of a model since it was first loaded: what it accepts, what it is, how fast it is here, and what
    memory its clips take (None where that was not counted)."""

    profile: ClipProfile
    facts: Mapping[str, Any]
    speed: Speed
    memory: Memory | None = None


@dataclass(frozen=True)
class EngineState:
    """What the worker is doing, for readiness and for /v1/models. Models stay known while it restarts.

    `model` is the one that the worker holds, or is loading; `weighed` the memory of the clip that was made last, as
    predicted and as it was, in bytes beside the weights.
    """

    phase: str = "starting"
    model: str | None = None
    models: Mapping[str, Known] = field(default_factory=dict)
    pid: int | None = None
    weighed: Mapping[str, float] = field(default_factory=dict)
    counters: Counters = field(default_factory=lambda: Counters([0] * SIZE))

    @property
    def ready(self) -> bool:
        """Whether a job would be run now."""
        return self.phase == "ready"

    def met(self, message: Mapping[str, Any]) -> EngineState:
        """The state after the worker has told what a model is."""
        name, speed = str(message["model"]), Speed(**message["speed"])
        before = self.models.get(name)
        if before is not None:  # what was learned from jobs outlives the worker
            speed = replace(speed, correction=before.speed.correction)
        memory = Memory(**message["memory"]) if message["memory"] else None
        known = Known(ClipProfile(**message["profile"]), message["facts"], speed, memory)
        return replace(self, model=name, models={**self.models, name: known})

    def corrected(self, name: str, correction: float) -> EngineState:
        """The state after a job has shown how far the predictions for its model are off."""
        known = self.models[name]
        speed = replace(known.speed, correction=correction)
        return replace(self, models={**self.models, name: replace(known, speed=speed)})


def profile_fields(profile: ClipProfile) -> dict[str, Any]:
    """A profile as plain data, for /v1/models."""
    return asdict(profile)
