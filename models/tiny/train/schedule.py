"""Learning rates by elapsed time, since a stage is given seconds and not steps."""

from __future__ import annotations

import math


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 % of the time, then a cosine down to 2 % of `peak`."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, progress / 0.03) * (0.02 + 0.98 * cosine)
