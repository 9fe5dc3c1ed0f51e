"""A clip's memory on a GPU, with Wan2.1's own VAE: predicted from small clips, and as torch's allocator counts it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import wan_runtime
from tests.weighed import Size, clip, learned, peak_on_gpu, published
from wan_runtime.serve import weighing
from wan_runtime.serve.memory import GIB, MARGIN, Memory, clip_bytes, refusal

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FITS: Size = (832, 480, 9)
TOO_LARGE: Size = (1280, 720, 9)  # with 2.3 times the feature maps of the other
UNDER, OVER = 0.03, 0.10  # by how much a prediction may be too small, and too great


@pytest.fixture(scope="module")
def pipe() -> Any:
    return published("cuda")


@pytest.fixture(scope="module")
def memory(pipe: Any) -> Memory:
    return learned(pipe)


@pytest.fixture
def unbounded() -> Iterator[None]:
    """Gives the process the whole GPU again."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [(640, 352, 17), (832, 480, 33), (480, 832, 49), (1280, 720, 17)])
def test_held_out_sizes_take_what_is_predicted(pipe: Any, memory: Memory, size: Size) -> None:
    asked = clip(pipe, size)
    predicted, seen = clip_bytes(memory, asked), peak_on_gpu(pipe, asked, memory)
    told = f"{predicted / GIB:.2f} GiB predicted, {seen / GIB:.2f} seen"
    assert (1 - UNDER) * seen <= predicted <= (1 + OVER) * seen, told


def test_the_room_is_what_the_process_may_take(pipe: Any, unbounded: None) -> None:
    rest, room = weighing.at_rest(pipe)
    total = torch.cuda.get_device_properties(0).total_memory
    assert rest == torch.cuda.memory_allocated() and room is not None and 0 < room <= total - rest
    torch.cuda.set_per_process_memory_fraction((rest + GIB) / total)
    bounded = weighing.at_rest(pipe)[1]
    assert bounded is not None and abs(bounded - GIB) < 2**20


def test_what_is_refused_runs_out_of_memory_and_what_is_not_is_made(
    pipe: Any, memory: Memory, unbounded: None
) -> None:
    small, large = clip(pipe, FITS, 1), clip(pipe, TOO_LARGE, 1)
    between = (1 + 4 * MARGIN) * clip_bytes(memory, small)
    assert between < 0.8 * clip_bytes(memory, large)
    rest = weighing.at_rest(pipe)[0]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((rest + between) / total)
    room = weighing.at_rest(pipe)[1]
    assert room is not None
    multiple = wan_runtime.clip_profile(pipe).size_multiple
    assert refusal(memory, small, multiple, room) is None
    wan_runtime.generate(pipe, small)
    reason = refusal(memory, large, multiple, room)
    assert reason is not None and f"there are {room / GIB:.2f} GiB" in reason
    weighing.at_rest(pipe)
    with pytest.raises(torch.OutOfMemoryError):
        wan_runtime.generate(pipe, large)
