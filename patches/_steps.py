"""Which steps of a generation attend in bf16 under FP8 attention: the first and the last, told from their timesteps.

A model sees one timestep a call, not how many there will be. Whoever drives the sampler tells the whole schedule
(`scheduled`); then the first and last steps are known exactly, to both experts of a two-expert model. Otherwise the
first are counted, from each rise of the timestep on, and the last are those at or under the timestep at which a
schedule of ASSUMED_STEPS steps with the flow shift ASSUMED_SHIFT would begin its last ones. What is in doubt attends
in bf16: that costs time and no quality.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

STEPS = "_wan_runtime_steps"  # on a model: its Steps
TRAINED = 1000  # timesteps run from this down to 0
ASSUMED_STEPS, ASSUMED_SHIFT = 20, 5.0
NEAR = 1e-3  # a timestep and its copy in another dtype


def last_timestep(count: int, steps: int = ASSUMED_STEPS, shift: float = ASSUMED_SHIFT) -> float:
    """The timestep at which the last `count` steps of diffusers' UniPC schedule begin, the highest of its schedulers':
    1000 shift s / (1 + (shift - 1) s) with s = 1 - 0.999 (steps - count) / steps."""
    share = 1 - (1 - 1 / TRAINED) * max(steps - count, 0) / steps
    return TRAINED * shift * share / (1 + (shift - 1) * share)


class Steps:
    """Where a model is in a generation, and whether it attends in bf16 there (`at_end`).

    count  how many steps at either end do.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.bounds: tuple[float, float] | None = None
        self.latest: float | None = None
        self.number = 0
        self.at_end = count > 0

    def tell(self, timesteps: Sequence[float] | None) -> None:
        """The schedule of the generation that begins, from its first timestep to its last; None: it is unknown."""
        self.bounds, self.latest = None, None
        if timesteps and self.count:
            inner = min(self.count, len(timesteps))
            self.bounds = (timesteps[inner - 1], timesteps[-inner])

    def see(self, timestep: float) -> None:
        """A forward begins, at this timestep (the noisiest of its tokens)."""
        if self.bounds is not None:
            first, last = self.bounds
            self.at_end = timestep >= first * (1 - NEAR) or timestep <= last * (1 + NEAR)
            return
        if self.latest is None or timestep > self.latest:
            self.number = 0
        elif timestep < self.latest:
            self.number += 1
        self.latest = timestep
        self.at_end = self.number < self.count or (self.count > 0 and timestep <= last_timestep(self.count))


class Watch:
    """A forward pre-hook on what embeds the timesteps.

    sinusoids  it is given not timesteps but [..., dim]: cosines, then sines, of timestep * 10000 ** (-j / (dim / 2)).
               The slowest wave's sine grows with the timestep, and so gives it back.
    """

    def __init__(self, steps: Steps, *, sinusoids: bool) -> None:
        self.steps, self.sinusoids = steps, sinusoids

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not args:
            return
        given: torch.Tensor = args[0]
        if not self.sinusoids:
            self.steps.see(float(given.max()))
            return
        half = given.shape[-1] // 2
        wave = min(float(given[..., -1].max()), 1.0)
        self.steps.see(math.asin(wave) * 10000.0 ** ((half - 1) / half))


def watch(model: nn.Module, embedder: nn.Module, count: int, *, sinusoids: bool) -> Steps:
    """Follow a model's steps from what embeds its timesteps; `unwatch` undoes it."""
    steps = model.__dict__[STEPS] = Steps(count)
    if count:
        embedder.register_forward_pre_hook(Watch(steps, sinusoids=sinusoids))
    return steps


def unwatch(model: nn.Module) -> None:
    """Undo `watch`, in a copy of a model too."""
    model.__dict__.pop(STEPS, None)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Watch):
                del module._forward_pre_hooks[key]


@contextlib.contextmanager
def scheduled(models: Iterable[nn.Module | None], timesteps: Sequence[float]) -> Iterator[None]:
    """Tell patched models all timesteps of the generation that runs inside, from the first to the last.

    Models that do not follow their steps (no FP8 attention) are left alone.
    """
    told = [model.__dict__[STEPS] for model in models if model is not None and STEPS in model.__dict__]
    for steps in told:
        steps.tell(timesteps)
    try:
        yield
    finally:
        for steps in told:
            steps.tell(None)
