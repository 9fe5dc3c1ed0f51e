"""Fused blocks and every attention on a GPU: against the host's own forward, under offload, and after unpatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wan_runtime
from tests.builders.wan import Sizes
from tests.hosts.diffusers import error, inputs, transformer
from wan_runtime.attention import ATTENTIONS, choose, refused
from wan_runtime.backends import _cublaslt
from wan_runtime.patches import _attending
from wan_runtime.patches._sharing import MEMO

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SIZES = Sizes(dim=384, ffn=1024, layers=6)
CUDA = torch.device("cuda")


def model(sizes: Sizes = SIZES, **options: Any) -> Any:
    made = transformer(BF16, sizes=sizes).to("cuda").requires_grad_(False)
    if options:
        wan_runtime.patch(made, **options)
    return made


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments, its tensors on the GPU."""
    return {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


@torch.no_grad()
def run(made: Any, **changes: Any) -> torch.Tensor:
    arguments = {**inputs(BF16, batch=changes.pop("batch", 1)), **changes}
    result: torch.Tensor = made(**on_gpu(arguments))[0]
    return result


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_attention_against_fp64(name: str) -> None:
    reason = refused(name, CUDA, BF16, 128)
    if reason is not None:
        pytest.skip(reason)
    packed = torch.randn(2, 700, 3, 5, 128, device="cuda", dtype=BF16)
    q, k, v = packed.unbind(2)
    truth = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) * 128**-0.5).softmax(3)
    truth = (truth @ v.double().transpose(1, 2)).transpose(1, 2)
    result = ATTENTIONS[name].attend(q, k, v)
    assert result.shape == q.shape and result.dtype is BF16
    assert error(result, truth) < (0.1 if name == "fp8" else 0.006)
    if name != "fp8":
        assert error(ATTENTIONS[name].attend(q[:, :300], k, v), truth[:, :300]) < 0.006


def test_the_choice_names_what_runs() -> None:
    chosen = choose("auto", CUDA, BF16, 128)
    assert chosen is not None and refused(chosen.name, CUDA, BF16, 128) is None
    assert all(reason for reason in chosen.passed.values())
    report = wan_runtime.patch(model(), attention=chosen.name)
    assert report.attention == chosen.name and report.fused


@pytest.mark.parametrize("weights", ["fp8", "nvfp4", "keep"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fused_is_as_near_to_fp32_as_unfused(weights: str, batch: int) -> None:
    plain = transformer(torch.float32, sizes=SIZES).to("cuda")
    with torch.no_grad():
        truth = plain(**on_gpu(inputs(torch.float32, batch=batch)))[0]
    unfused = error(run(model(weights=weights, fuse=False), batch=batch), truth)
    fused = error(run(model(weights=weights), batch=batch), truth)
    assert fused < 1.1 * unfused + 1e-3


def test_a_timestep_a_token() -> None:
    timestep = ((torch.arange(48) >= 16) * 500.0)[None]
    expected = run(model(weights="keep", fuse=False), timestep=timestep)
    assert error(run(model(weights="keep"), timestep=timestep), expected) < 0.02


def test_fp8_attention_runs_in_the_inner_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refused("fp8", CUDA, BF16, 128)
    if reason is not None:
        pytest.skip(reason)
    plain = run(model(weights="fp8", attention="fa3"))
    made = model(weights="fp8", attention="fp8", attention_end_steps=0)
    assert error(run(made), plain) < 1e-6  # 48 tokens are short
    monkeypatch.setattr(_attending, "SHORT", 0)
    assert [block.attn1.processor.name for block in made.blocks] == ["fa3", "fp8", "fp8", "fp8", "fp8", "fa3"]
    assert 1e-6 < error(run(made), plain) < 0.05
    first = model(weights="fp8", attention="fp8", attention_end_steps=1)
    assert error(run(first), plain) < 1e-6  # the first step it sees
    assert (
        1e-6
        < error(
            run(first, timestep=torch.tensor([400.0])),
            run(model(weights="fp8", attention="fa3"), timestep=torch.tensor([400.0])),
        )
        < 0.05
    )


@torch.no_grad()
def test_weights_written_between_two_steps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attending, "SHORT", 0)
    plain = refused("fp8", CUDA, BF16, 128) is not None
    fp8: dict[str, Any] = {} if plain else {"attention": "fp8", "attention_end_steps": 0}
    made = model(weights="fp8", **fp8)
    before = run(made)
    assert torch.equal(run(made), before)
    for norm in (made.blocks[1].attn2.norm_k, made.blocks[2].attn1.norm_k):
        norm.weight.mul_(3)
    after = run(made)
    made.blocks[0].__dict__[MEMO].shared.clear()
    assert torch.equal(run(made), after) and error(after, before) > 1e-4


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_gives_the_same(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Added by a pass the stream is rounded alike whether a block before has begun the next one's work or not.
    monkeypatch.setitem(_cublaslt._REFUSED, 0, "it is not asked in this test")
    made = model(weights="fp8")
    expected = run(made)
    made.to("cpu")
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    made.enable_group_offload(
        onload_device=CUDA, offload_device=torch.device("cpu"), offload_type=level, **options
    )
    assert error(run(made), expected) < (1e-6 if level == "block_level" else 0.03)
    assert error(run(made), expected) < (1e-6 if level == "block_level" else 0.03)


def test_unpatch_gives_the_hosts_forward_back() -> None:
    made = model()
    before = run(made)
    wan_runtime.patch(made, weights="keep")
    run(made)
    wan_runtime.unpatch(made)
    assert not any(MEMO in module.__dict__ for module in made.modules())
    assert error(run(made), before) < 1e-6


# Inductor imports what torch itself has deprecated, and its tracer makes an instance of FlashAttention's function.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_blocks_compile_whole_and_say_the_same() -> None:
    made = model(weights="fp8")
    expected = run(made)
    torch._dynamo.reset()
    made.compile_repeated_blocks(fullgraph=True)
    assert error(run(made), expected) < 0.02
