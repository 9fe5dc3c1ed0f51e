"""What fused blocks keep from one forward to the next, and that they forget it once a weight it was made of is written:
the kernels' twins on the CPU, in diffusers' models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from accelerate import cpu_offload

from tests.builders.wan import TINY
from tests.hosts.diffusers import error, inputs
from tests.test_fp8_attention import TWO_BLOCKS, in_diffusers
from tests.test_fused_block import coded, fused, patched, run
from wan_runtime.attention import ATTENTIONS
from wan_runtime.patches import _attending
from wan_runtime.patches._attending import Attending
from wan_runtime.patches._sharing import MEMO
from wan_runtime.patches._snapshot import Snapshot, held, tracked


def test_prompts_are_remembered_by_value() -> None:
    model = patched()
    twin = coded(fused(model))
    calls = []
    twin.get_submodule("blocks.1.attn2.to_k").register_forward_hook(lambda *_: calls.append(1))
    first = run(twin)
    other = torch.randn_like(inputs()["encoder_hidden_states"])
    assert error(run(twin, encoder_hidden_states=other), first) > 1e-4
    assert torch.equal(run(twin), first)
    shared = twin.blocks[0].__dict__[MEMO].shared
    assert len(shared.prompts) == 2
    assert set(shared.prompts[0].made) == {0}  # block 1's k carries a hook: called each time
    assert len(calls) == 3
    third = torch.randn_like(other)
    run(twin, encoder_hidden_states=third)
    assert len(shared.prompts) == 2 and shared.prompts[0].context.shape[1] == other.shape[1]
    twin.to(torch.float32)
    assert shared.prompts == []


def test_new_weights_forget_what_the_old_ones_made() -> None:
    model = patched()
    twin = coded(fused(model))
    before = run(twin)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    for name in state:
        if name.endswith("attn2.to_v.payload"):
            state[name] = state[name].flip(0)
    twin.load_state_dict(state)
    assert error(run(twin), before) > 1e-4


def shared_of(model: Any) -> Any:
    return model.blocks[0].__dict__[MEMO].shared


@torch.inference_mode()
def in_inference_mode(parameter: nn.Parameter) -> None:
    parameter.mul_(3)


WRITES: dict[str, Callable[[nn.Module, str], Any]] = {
    "in place": lambda module, name: module.get_parameter(name).mul_(3),
    "in inference mode": lambda module, name: in_inference_mode(module.get_parameter(name)),
    "new data": lambda module, name: setattr(
        module.get_parameter(name), "data", module.get_parameter(name) * 3
    ),
    "a new parameter": lambda module, name: module.register_parameter(
        name, nn.Parameter(module.get_parameter(name) * 3, requires_grad=False)
    ),
    "a state dict of the part": lambda module, name: module.load_state_dict(
        {**module.state_dict(), name: module.get_parameter(name) * 3}
    ),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("part", "name"), [("attn2.norm_k", "weight"), ("attn2.to_v", "bias")])
@torch.no_grad()
def test_keys_and_values_are_those_of_the_weights_there_now(part: str, name: str, write: str) -> None:
    twin = coded(fused(patched()))
    before = run(twin)
    kept = shared_of(twin).prompts[0].made[1][1][0]
    assert torch.equal(run(twin), before)
    assert shared_of(twin).prompts[0].made[1][1][0] is kept  # made once
    WRITES[write](twin.blocks[1].get_submodule(part), name)
    after = run(twin)
    shared_of(twin).clear()
    assert torch.equal(after, run(twin)) and error(after, before) > 1e-4


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("norm", ["norm_q", "norm_k"])
@torch.no_grad()
def test_fp8_attention_s_scales_are_those_of_the_weights_there_now(
    norm: str, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attending, "attend", lambda self, *qkv: ATTENTIONS["sdpa"].attend(*qkv))
    monkeypatch.setattr(_attending, "SHORT", 0)
    model, twin, calls = in_diffusers(TWO_BLOCKS)
    run(twin)
    kept = shared_of(twin).folded[2]
    run(twin)
    assert len(calls) == 4 and shared_of(twin).folded[2] is kept
    for each in (model, twin):
        WRITES[write](each.blocks[2].attn1.get_submodule(norm), "weight")
    assert error(run(twin), run(model)) < 0.02
    assert shared_of(twin).folded[2] is not kept


@torch.no_grad()
def test_weights_whose_writes_torch_does_not_count_are_read_each_time() -> None:
    twin = coded(fused(patched()))
    with torch.inference_mode():
        for block in twin.blocks:
            norm = block.attn2.norm_k
            norm.weight = nn.Parameter(norm.weight.clone(), requires_grad=False)
        before = run(twin)
        assert shared_of(twin).prompts == []
        twin.blocks[1].attn2.norm_k.weight.mul_(3)
        assert error(run(twin), before) > 1e-4


def _write_rotations(rope: nn.Module) -> None:
    rope.get_buffer("freqs_cos").mul_(0.5)


def _replace_rotations(rope: Any) -> None:
    rope.freqs_cos = rope.freqs_cos * 0.5


@pytest.mark.parametrize("write", [_write_rotations, _replace_rotations])
@torch.no_grad()
def test_rotary_tables_are_those_of_the_rotations_there_now(write: Callable[[Any], None]) -> None:
    """As extrapolation to longer clips changes them."""
    model = patched()
    twin = fused(model)
    before = run(twin)
    for each in (model, twin):
        write(each.rope)
    assert error(run(twin), run(model)) < 2e-5 < error(run(twin), before)
    kept = twin.rope(inputs()["hidden_states"])[0]
    assert twin.rope(inputs()["hidden_states"])[0] is kept


@torch.no_grad()
def test_rotations_whose_writes_torch_does_not_count_are_read_each_time() -> None:
    model = patched()
    twin = fused(model)
    with torch.inference_mode():
        for each in (model, twin):
            each.rope.freqs_cos = each.rope.freqs_cos.clone()
            run(each)
            each.rope.freqs_cos.mul_(0.5)
        assert error(run(twin), run(model)) < 2e-5


def _write_text(block: nn.Module, arguments: tuple[Any, ...]) -> None:
    arguments[1].mul_(-8)


def _write_steps(block: nn.Module, arguments: tuple[Any, ...]) -> None:
    arguments[2].mul_(-8)


@pytest.mark.parametrize("write", [_write_text, _write_steps])
@pytest.mark.parametrize("timestep", [0, 500], ids=["two timesteps", "one"])
@torch.no_grad()
def test_what_a_block_s_hook_writes_counts(write: Any, timestep: int) -> None:
    """Both are one tensor that every block is given."""
    model = patched()
    twin = coded(fused(model))
    changes = {"timestep": torch.tensor([500.0]) if timestep else TWO_TIMESTEPS}
    before = run(twin, **changes)
    hooks = [each.blocks[1].register_forward_pre_hook(write) for each in (model, twin)]
    assert error(run(twin, **changes), run(model, **changes)) < 0.02 < error(run(twin, **changes), before)
    for hook in hooks:
        hook.remove()
    assert torch.equal(run(twin, **changes), before)


@torch.no_grad()
def test_a_hook_that_writes_into_what_the_rotary_embedding_gives() -> None:
    model = patched()
    twin = fused(model)
    scale = torch.ones(())

    def write(module: nn.Module, args: Any, tables: Any) -> None:
        for table in tables:
            table.mul_(scale)

    for each in (model, twin):
        each.rope.register_forward_hook(write)
    for factor in (1, 4, 4, 1):
        scale.fill_(factor)
        assert error(run(twin), run(model)) < 2e-5


def test_nothing_that_is_kept_keeps_offloaded_weights_alive() -> None:
    twin = coded(fused(patched()))
    run(twin)
    payload = weakref.ref(twin.blocks[0].attn2.to_k.get_parameter("payload"))
    embedder = weakref.ref(twin.condition_embedder.text_embedder.linear_1.weight)
    cpu_offload(twin, execution_device=torch.device("cpu"))
    gc.collect()
    assert payload() is None and embedder() is None


TOKENS = 3 * 4 * 4
TWO_TIMESTEPS = (torch.arange(TOKENS) < 16)[None] * 500.0


@torch.no_grad()
def test_nothing_keeps_a_modulation_a_token_after_a_forward() -> None:
    """It is 1 GB of TI2V-5B at 720p."""
    twin = fused(patched())
    made = []
    twin.condition_embedder.register_forward_hook(
        lambda module, args, result: made.append(StorageWeakRef(result[1].untyped_storage()))
    )
    run(twin, timestep=TWO_TIMESTEPS)
    gc.collect()
    assert len(made) == 1 and made[0].expired()
    assert shared_of(twin).steps.rows.shape[0] == 2


@torch.no_grad()
def test_a_part_of_a_modulation_is_not_taken_for_the_whole() -> None:
    """As a block is given it that serves the clips of a batch one by one."""
    model = patched()
    twin = fused(model)
    _, steps, context, _ = twin.condition_embedder(
        torch.cat((TWO_TIMESTEPS, TWO_TIMESTEPS.flip(1))).flatten(), torch.randn(2, 16, 32), None, TOKENS
    )
    rotary = twin.rope(inputs()["hidden_states"])
    x = torch.randn(2, TOKENS, TINY.dim)
    steps = steps.unflatten(2, (6, -1))
    for clip in (slice(0, 1), slice(1, 2), slice(0, 2)):
        arguments = x[clip], context[clip], steps[clip], rotary
        assert error(twin.blocks[0](*arguments), model.blocks[0](*arguments)) < 2e-5


def test_a_snapshot_of_no_tensor_and_of_others() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert held(one, two) == [one.weight, one.bias, two.weight, two.bias]
    taken = Snapshot(held(one))
    assert taken.matches(held(one)) and not taken.matches(held(two)) and not taken.matches(held(one, two))
    assert Snapshot([]).matches([])
    with torch.inference_mode():
        assert not tracked([torch.zeros(1)])
