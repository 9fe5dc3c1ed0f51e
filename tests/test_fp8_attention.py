"""FP8 attention: which blocks, steps and lengths it leaves to bf16, in diffusers' models and under the original names.

No GPU is needed: the kernels' twins make the codes, and what FlashAttention 3 computes from them is written out here.
"""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests.builders.wan import Sizes
from tests.hosts import diffusers, original
from tests.hosts.diffusers import error, latents, pipeline, transformer
from tests.test_fused_block import patched, run
from wan_runtime.attention import ATTENTIONS, ENDS, Ends
from wan_runtime.errors import InvalidOption
from wan_runtime.options import AttentionEndBlocks, AttentionEndSteps
from wan_runtime.patches import (
    _attending,
    _attention_processor,
    _original_attention,
    _original_block,
    _wan_block,
    scheduled,
)
from wan_runtime.patches._attending import SHORT, Attending
from wan_runtime.patches._steps import STEPS
from wan_runtime.plan import Options
from wan_runtime.scheduling import timesteps

FP32 = ("cpu", torch.float32)
SIX = Sizes(layers=6, dim=256)
TWO_BLOCKS = Ends(blocks=2, steps=0)


def attend_codes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    """What FlashAttention 3 computes from codes, in fp32."""
    q, k, v = (
        (t.float() * s[:, None, :, None]).transpose(1, 2) for t, s in zip((q, k, v), scales, strict=True)
    )
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.fixture(autouse=True)
def _no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would need a GPU: its bf16 kernel beside the FP8 one."""
    monkeypatch.setattr(Attending, "attend", lambda self, *qkv: ATTENTIONS["sdpa"].attend(*qkv))
    monkeypatch.setattr(original, "HALF", None)


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attending, "SHORT", 0)


def coded(attending: list[Attending]) -> list[int]:
    """Puts `attend_codes` where FP8 was chosen, and counts its calls."""
    calls: list[int] = []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return attend_codes(*args)

    for one in attending:
        if one.codes is not None:
            one.codes = counted
    return calls


def in_diffusers(ends: Ends) -> tuple[Any, Any, list[int]]:
    """A model, its fused twin with FP8 attention, and what counts the calls of that."""
    model = patched(SIX)
    twin = copy.deepcopy(model)
    _attention_processor.uninstall(twin)
    _attention_processor.install(twin, "fp8", FP32, ends)
    _wan_block.fuse(twin, "TWINS")
    return model, twin, coded([block.attn1.processor for block in twin.blocks])


def in_the_release(ends: Ends) -> tuple[Any, Any, list[int]]:
    model: Any = original.transformer(sizes=SIX, release="2.2").requires_grad_(False)
    wan_runtime.patch(model)
    twin = copy.deepcopy(model)
    _original_attention.install(twin, "fp8", FP32, ends)
    _original_block.fuse(twin, "TWINS")
    return model, twin, coded([_original_attention.attending_of(block.self_attn) for block in twin.blocks])


def run_release(model: Any, batch: int = 1, **changes: Any) -> torch.Tensor:
    given = {**diffusers.inputs(batch=batch), **changes}
    with torch.no_grad():
        result: torch.Tensor = model(
            given["hidden_states"], given["timestep"], given["encoder_hidden_states"]
        )
    return result


HOSTS = [(in_diffusers, run), (in_the_release, run_release)]


@pytest.mark.parametrize(("host", "forward"), HOSTS)
@pytest.mark.parametrize(("blocks", "batch"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.usefixtures("any_length")
def test_the_inner_blocks_are_fp8(host: Any, forward: Any, blocks: int, batch: int) -> None:
    model, twin, calls = host(Ends(blocks, steps=0))
    expected, result = forward(model, batch=batch), forward(twin, batch=batch)
    assert len(calls) == 6 - 2 * blocks
    assert 1e-5 < error(result, expected) < 0.02
    assert torch.equal(forward(copy.deepcopy(twin), batch=batch), result)


@pytest.mark.parametrize(("blocks", "fp8"), [(0, 6), (1, 4), (2, 2), (3, 0), (40, 0)])
def test_how_many_blocks_is_an_option(blocks: int, fp8: int) -> None:
    model = transformer(sizes=SIX)
    notes = _attention_processor.install(model, "fp8", FP32, Ends(blocks, 1))
    names = [block.attn1.processor.name for block in model.blocks]
    assert names == ["fa3"] * min(blocks, 3) + ["fp8"] * fp8 + ["fa3"] * min(blocks, 3)
    assert {block.attn2.processor.name for block in model.blocks} == {"fa3"}
    assert len(notes) == 1 and f"FP8 in the self-attention of {fp8} of 6 blocks" in notes[0]
    said = {0: "", 1: "the first and last block, "}.get(blocks, f"the first and last {blocks} blocks, ")
    assert f"bf16 (fa3) in {said}the first and last step, cross-attention" in notes[0]
    tree: Any = original.transformer(sizes=SIX)
    assert _original_attention.install(tree, "fp8", FP32, Ends(blocks, 1)) == notes
    names = [_original_attention.attending_of(block.self_attn).name for block in tree.blocks]
    assert names == ["fa3"] * min(blocks, 3) + ["fp8"] * fp8 + ["fa3"] * min(blocks, 3)


@pytest.mark.parametrize(("host", "forward"), HOSTS)
def test_short_sequences_are_bf16(host: Any, forward: Any) -> None:
    model, twin, calls = host(TWO_BLOCKS)
    assert error(forward(twin), forward(model)) < 2e-5 and calls == []  # 48 tokens
    attending = Attending("fp8", FP32)
    assert not attending.takes_codes(SHORT - 1) and attending.takes_codes(SHORT)
    assert not Attending("fa3", FP32).takes_codes(SHORT)


@pytest.mark.usefixtures("any_length")
def test_a_mask_is_left_to_the_host() -> None:
    plain, model = transformer(sizes=SIX), transformer(sizes=SIX)
    _attention_processor.install(model, "fp8", FP32, TWO_BLOCKS)
    x = torch.randn(1, 9, 256, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        for number in (0, 3):  # bf16 and FP8
            own, ours = plain.blocks[number].attn1, model.blocks[number].attn1
            assert torch.equal(ours(x, attention_mask=mask), own(x, attention_mask=mask))
            assert error(own(x, attention_mask=mask), own(x)) > 0.01


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("told", [True, False])
def test_in_a_pipeline(told: bool) -> None:
    _, twin, calls = in_diffusers(Ends(blocks=2, steps=1))
    pipe = pipeline(twin)
    at: list[int] = []
    twin.register_forward_hook(lambda *_: at.append(len(calls)))
    seen = timesteps(pipe.scheduler, 5)
    for _ in range(2):
        calls.clear()
        at.clear()
        with scheduled((twin, None), seen if told else []):
            latents(pipe, steps=5)
        per_forward = [b - a for a, b in zip([0, *at], at, strict=False)]
        assert per_forward == [0, 0, 2, 2, 2, 2, 2, 2, 0, 0] or (not told and per_forward[:4] == [0, 0, 2, 2])
    if told:
        assert twin.__dict__[STEPS].bounds is None  # for whoever drives it next


def test_generate_tells_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan_runtime.load_pipeline(device="cpu")
    _attention_processor.install(pipe.transformer, "fp8", FP32, Ends(blocks=2, steps=1))
    found: list[bool] = []
    request = wan_runtime.clip_profile(pipe).request(
        "a large red circle moving right on a black background", width=32, height=32, num_frames=1,
        num_inference_steps=4, flow_shift=9.0, seed=1,
    )  # fmt: skip
    wan_runtime.generate(pipe, request, lambda *_: found.append(pipe.transformer.__dict__[STEPS].at_end))
    assert found == [True, False, False, True]


def test_the_ends_are_for_fp8_attention_and_no_less_than_none() -> None:
    with pytest.raises(InvalidOption, match=r"attention_end_blocks=3 says .* attention='auto'"):
        wan_runtime.patch(transformer(), attention_end_blocks=3)
    with pytest.raises(InvalidOption, match=r"attention_end_steps=1 .* attention='sdpa'"):
        wan_runtime.patch(transformer(), attention="sdpa", attention_end_steps=1)
    with pytest.raises(InvalidOption, match=r"attention_end_steps=-1 is not a number of steps"):
        wan_runtime.patch(transformer(), attention="fp8", attention_end_steps=-1)


def test_one_block_and_one_step_by_default() -> None:
    assert Ends(1, 1) == ENDS == Options(attention="fp8").ends
    model = transformer(sizes=SIX)
    notes = _attention_processor.install(model, "fp8", FP32)
    names = [block.attn1.processor.name for block in model.blocks]
    assert names == ["fa3", "fp8", "fp8", "fp8", "fp8", "fa3"]
    assert "the first and last block, the first and last step" in notes[0]
    for of_command in (AttentionEndBlocks, AttentionEndSteps):
        assert "(default 1)" in get_args(of_command)[1].help


def test_unpatch_forgets_the_steps() -> None:
    model = transformer()
    before = set(model.__dict__)
    _attention_processor.install(model, "fp8", FP32)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        assert len(each.condition_embedder._forward_pre_hooks) == 1
        _attention_processor.uninstall(each)
        assert not each.condition_embedder._forward_pre_hooks and set(each.__dict__) == before
