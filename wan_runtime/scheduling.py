"""The scheduler of one clip: with the flow shift that was asked for, and its timesteps told to the models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from wan_runtime.errors import InvalidRequest


@contextlib.contextmanager
def scheduler_of(pipe: Any, flow_shift: float | None, steps: int) -> Iterator[None]:
    """Lends a pipeline a scheduler for a clip of so many steps; None keeps its own flow shift.

    Models with FP8 attention learn the clip's timesteps, and with them which steps are the first and the last.
    """
    from wan_runtime.patches import scheduled

    own = pipe.scheduler
    if flow_shift is not None:
        pipe.scheduler = _shifted(own, flow_shift)
    try:
        with scheduled((pipe.transformer, pipe.transformer_2), timesteps(pipe.scheduler, steps)):
            yield
    finally:
        pipe.scheduler = own


def timesteps(scheduler: Any, steps: int) -> list[float]:
    """A scheduler's timesteps for so many steps, from the first to the last; the scheduler itself is left alone."""
    twin = type(scheduler).from_config(scheduler.config)
    twin.set_timesteps(steps)
    return [float(timestep) for timestep in twin.timesteps]


def _shifted(own: Any, flow_shift: float) -> Any:
    # UniPC and DPM++ call it flow_shift, FlowMatchEuler calls it shift
    names = [name for name in ("flow_shift", "shift") if name in own.config]
    if not names:
        raise InvalidRequest(
            "flow_shift",
            "invalid_flow_shift",
            f"This model's scheduler, {type(own).__name__}, has no flow shift.",
        )
    return type(own).from_config(own.config, **{names[0]: flow_shift})
