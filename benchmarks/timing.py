"""Milliseconds of a call on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

WAIT = 2_000_000  # cycles, some millisecond


def wait() -> None:
    """Keep the GPU waiting."""
    torch.cuda._sleep(WAIT)


def milliseconds(call: Callable[[], object], before: Callable[[], object] = wait) -> float:
    """Between two events on the GPU, which is busy with `before` until all is queued, as in a model."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
