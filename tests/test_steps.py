"""Which steps of a generation are its first and last: exactly where the schedule was told, else from the timesteps."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.hosts import original
from tests.hosts.diffusers import transformer
from tests.hosts.test_original import diffsynth
from wan_runtime.attention import Ends
from wan_runtime.patches import _attention_processor
from wan_runtime.patches._steps import Steps, Watch, last_timestep
from wan_runtime.scheduling import timesteps

__all__ = ["diffsynth"]  # a fixture


def ends_of(steps: Steps, seen: list[float]) -> list[bool]:
    """Whether each step is an end, where each is seen twice, as guidance does."""
    found = []
    for timestep in seen:
        for _ in range(2):
            steps.see(timestep)
        found.append(steps.at_end)
    return found


SCHEDULES = [
    FlowMatchEulerDiscreteScheduler(shift=5.0),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    ),
]


@pytest.mark.parametrize("scheduler", SCHEDULES)
@pytest.mark.parametrize(("count", "length"), [(1, 50), (2, 50), (3, 20), (1, 4), (3, 4)])
def test_a_schedule_that_was_told_is_kept_exactly(scheduler: Any, count: int, length: int) -> None:
    seen = timesteps(scheduler, length)
    steps = Steps(count)
    steps.tell(seen)
    inner = max(length - 2 * count, 0)
    ends = (length - inner) // 2
    assert ends_of(steps, seen) == [True] * ends + [False] * inner + [True] * (length - inner - ends)


@pytest.mark.parametrize("scheduler", SCHEDULES)
@pytest.mark.parametrize(("count", "length"), [(1, 50), (2, 50), (1, 20), (3, 20), (1, 8)])
def test_without_a_schedule_the_first_are_counted_and_the_last_are_at_least_so_many(
    scheduler: Any, count: int, length: int
) -> None:
    seen = timesteps(scheduler, length)
    steps = Steps(count)
    ends = ends_of(steps, seen)
    assert ends[: count + 1] == [True] * count + [False]
    last = ends[::-1].index(False)
    least = count if length >= 20 else 0
    assert least <= last <= max(5 * count, 1)
    assert ends_of(steps, seen) == ends  # a rise begins a new one
    steps.see(seen[5])
    assert ends_of(steps, seen) == ends  # after one that was given up, too


@pytest.mark.parametrize(("shift", "length"), [(3.0, 50), (5.0, 50), (5.0, 20)])
def test_the_last_timesteps_are_the_schedulers_own(shift: float, length: int) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    seen = timesteps(scheduler, length)
    for count in (1, 2, 5):
        assert last_timestep(count, length, shift) == pytest.approx(seen[-count], abs=1)  # its are integers
    assert last_timestep(99) == 1000


def test_no_steps_are_no_ends() -> None:
    steps = Steps(0)
    assert not steps.at_end and ends_of(steps, [999.0, 500.0, 1.0]) == [False] * 3
    model = transformer()
    _attention_processor.install(model, "fp8", ("cpu", torch.float32), Ends(steps=0))
    assert not model.condition_embedder._forward_pre_hooks


@pytest.mark.usefixtures("diffsynth")
def test_timesteps_come_back_from_their_sinusoids() -> None:
    module: Any = importlib.import_module("diffsynth.models.wan_video_dit")
    asked = timesteps(FlowMatchEulerDiscreteScheduler(shift=5.0), 30)
    for dim in (256, 32):
        steps = Steps(2)
        watch = Watch(steps, sinusoids=True)
        for timestep in asked:
            watch(torch.nn.Identity(), (original.embed(dim, torch.tensor([timestep])).float(),))
            assert steps.latest == pytest.approx(timestep, rel=1e-3)
        a_token = original.embed(dim, torch.tensor([0.0, asked[3], 0.0]))[None].float()
        watch(torch.nn.Identity(), (a_token,))
        assert steps.latest == pytest.approx(asked[3], rel=1e-3)  # the noisiest
    steps = Steps(1)
    watch = Watch(steps, sinusoids=True)
    ends = []
    for timestep in asked:  # DiffSynth's are bf16: they come back by 1 in 100, and never rise
        given = torch.tensor([timestep], dtype=torch.bfloat16)
        watch(torch.nn.Identity(), (module.sinusoidal_embedding_1d(256, given),))
        assert steps.latest == pytest.approx(timestep, rel=0.012)
        ends.append(steps.at_end)
    assert ends[0] and not any(ends[4:-3]) and ends[-1]
