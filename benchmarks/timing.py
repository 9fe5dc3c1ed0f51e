"""Milliseconds of a call on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

WAIT = 2_000_000  # cycles, some millisecond


def milliseconds(call: Callable[[], object]) -> float:
    """Between two events on the GPU, which waits until all is queued: in a model Python is far ahead of it."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(WAIT)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
