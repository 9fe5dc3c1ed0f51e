"""A block's last pass makes the first norm of the block after it, where that will be given what this one gave: on the
CPU in fp32, against the host's own forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests.builders.wan import Sizes
from tests.hosts.diffusers import error, inputs, transformer
from wan_runtime.kernels import fused
from wan_runtime.patches import _carrying, _modulation, _wan_block
from wan_runtime.patches._shared import Shared

EXACT = 2e-5  # fp32 sums in another order
DEEP = Sizes(layers=3)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each first norm that was made in a pass of its own."""
    made: list[int] = []
    alone = fused.TWINS.norm_modulate

    def counted(x: torch.Tensor, *rest: Any) -> Any:
        made.append(x.shape[0])
        return alone(x, *rest)

    monkeypatch.setattr(fused, "TWINS", fused.Kernels(**{**vars(fused.TWINS), "norm_modulate": counted}))
    return made


def pair() -> tuple[Any, Any]:
    """The same patched model, on the host's forward and on the fused one."""
    host = transformer(sizes=DEEP)
    wan_runtime.patch(host, attention="sdpa")
    host.to(torch.float32)
    twin = copy.deepcopy(host)
    _wan_block.fuse(twin, "TWINS")
    return host, twin


@torch.no_grad()
def run(model: Any, seed: int = 0) -> torch.Tensor:
    result: torch.Tensor = model(**inputs(seed=seed))[0]
    return result


def test_only_the_first_block_makes_its_own(norms: list[int]) -> None:
    host, twin = pair()
    for seed in (0, 1):
        norms.clear()
        assert error(run(twin, seed), run(host, seed)) < EXACT and len(norms) == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copys_blocks_know_each_other(copied: Callable[[Any], Any], norms: list[int]) -> None:
    host, twin = pair()
    again = copied(twin)
    del twin
    assert error(run(again, 1), run(host, 1)) < EXACT and len(norms) == 1


@pytest.mark.parametrize("change", [lambda x: x.mul_(1.5), lambda x: x * 1.5], ids=["in place", "anew"])
def test_a_stream_that_the_host_changes_between_blocks_is_normalised_again(
    change: Callable[[torch.Tensor], torch.Tensor], norms: list[int]
) -> None:
    host, twin = pair()
    for _ in range(2):
        run(twin)
    for model in (host, twin):
        model.blocks[0].register_forward_hook(lambda module, args, output: change(output))
    for seed in (1, 2):
        norms.clear()
        assert error(run(twin, seed), run(host, seed)) < EXACT and len(norms) == 2


def test_a_block_left_out_leaves_the_others_right(norms: list[int]) -> None:
    host, twin = pair()
    for _ in range(2):
        run(twin)
    for model in (host, twin):
        del model.blocks[1]
    for seed in (1, 2, 3):
        assert error(run(twin, seed), run(host, seed)) < EXACT


def test_inference_mode_carries_nothing(norms: list[int]) -> None:
    host, twin = pair()
    with torch.inference_mode():
        for seed in (1, 2):
            norms.clear()
            assert error(run(twin, seed), run(host, seed)) < EXACT and len(norms) == DEEP.layers


def test_a_stream_from_outside_inference_mode(norms: list[int]) -> None:
    host, twin = pair()
    for _ in range(2):
        run(twin)
    given: list[Any] = []
    host.blocks[0].register_forward_pre_hook(lambda _, args: given.append(args))
    run(host)
    norms.clear()
    with torch.inference_mode():
        results = []
        for model in (twin, host):
            stream, *others = given[0]
            for block in model.blocks:
                stream = block(stream, *others)
            results.append(stream)
    assert error(*results) < EXACT and len(norms) == DEEP.layers


def test_modulation_is_cast_once_a_forward_and_again_where_it_was_written_into() -> None:
    shared, steps = Shared(), torch.randn(1, 6, 8, dtype=torch.bfloat16)
    cast = shared.in_fp32(steps)
    assert torch.equal(cast, steps.float()) and shared.in_fp32(steps) is cast
    steps.mul_(2)
    assert torch.equal(shared.in_fp32(steps), steps.float())
    shared.begin()
    steps.data.mul_(2)  # which torch's count of writes does not tell, and the next forward does not need
    assert torch.equal(shared.in_fp32(steps), steps.float())
    with torch.inference_mode():
        steps = torch.randn(1, 6, 8, dtype=torch.bfloat16)
        assert torch.equal(shared.in_fp32(steps), steps.float())
        steps.mul_(2)
        assert torch.equal(shared.in_fp32(steps), steps.float())


def test_each_blocks_modulation_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, twin = pair()
    run(twin)
    made = []
    rows_of = _modulation.rows_of

    def counted(own: torch.Tensor, *rest: Any) -> Any:
        made.append(id(own))
        return rows_of(own, *rest)

    monkeypatch.setattr(_carrying, "rows_of", counted)
    run(twin, 1)
    assert len(made) == len(set(made)) == DEEP.layers
