"""The fused block forward in hosts under the original names: the kernels' plain-torch twins on the CPU, in fp32,
against the host's own forward of the same patched model. The release is its tree of tests/hosts, DiffSynth-Studio its
own class."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests.builders import files
from tests.builders.wan import TINY, Sizes, block_linears, state
from tests.hosts import diffusers, original
from tests.hosts.diffusers import error
from tests.hosts.test_original import diffsynth
from tests.test_carried_norm import norms
from wan_runtime.errors import BackendUnavailable
from wan_runtime.linear import QuantLinear
from wan_runtime.patches import _original_block, _rotary
from wan_runtime.patches._fused import takes_codes
from wan_runtime.patches._modulation import distinct
from wan_runtime.patches._original_attention import install
from wan_runtime.patches._sharing import MEMO

__all__ = ["diffsynth", "norms"]  # fixtures
EXACT = 2e-5  # fp32 sums in another order
FP32 = ("cpu", torch.float32)
IMAGE = Sizes(image=64)
TOKENS = 3 * 4 * 4


@pytest.fixture(autouse=True)
def _attention_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original, "HALF", None)


class Spy:
    """Counts the blocks that ran fused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.results: list[torch.dtype] = []
        ran = _original_block.run

        def counted(*args: Any) -> torch.Tensor:
            self.count += 1
            result = ran(*args)
            self.results.append(result.dtype)
            return result

        monkeypatch.setattr(_original_block, "run", counted)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def patched(sizes: Sizes = TINY, release: str = "2.1", **options: Any) -> Any:
    model = original.transformer(sizes=sizes, release=release).requires_grad_(False)
    report = wan_runtime.patch(model, **options)
    assert report.attention is None and not report.fused  # the oracle: nothing here but the host's own
    return model


def fused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    install(twin, "sdpa", FP32)
    assert _original_block.fuse(twin, "TWINS") == []
    return twin


@torch.no_grad()
def run(model: Any, batch: int = 1, **changes: Any) -> torch.Tensor:
    given = {**diffusers.inputs(batch=batch), **changes}
    arguments = (given["hidden_states"], given["timestep"], given["encoder_hidden_states"])
    result: torch.Tensor = model(*arguments, given.get("image"))
    return result


@pytest.mark.parametrize("weights", ["fp8", "nvfp4", "keep"])
@pytest.mark.parametrize("release", ["2.1", "2.2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_text_to_video(weights: str, release: str, batch: int, spy: Spy) -> None:
    model = patched(release=release, weights=weights)
    timestep = torch.tensor([500.0, 20.0])[:batch]
    expected = run(model, batch, timestep=timestep)
    assert spy.count == 0
    assert error(run(fused(model), batch, timestep=timestep), expected) < EXACT
    assert spy.count == TINY.layers


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_timestep_a_token(count: int, spy: Spy) -> None:
    model = patched(release="2.2")
    twin = fused(model)
    timestep = (torch.arange(TOKENS) % count * 70.0 + 3)[None]
    assert error(run(twin, timestep=timestep), run(model, timestep=timestep)) < EXACT
    shared = twin.blocks[0].__dict__[MEMO].shared
    assert shared.steps.rows.shape[0] == count  # what is embedded and what modulates, not a row a token
    both = torch.cat((timestep, timestep.flip(1)))
    assert error(run(twin, 2, timestep=both), run(model, 2, timestep=both)) < EXACT
    assert shared.steps.rows.shape[0] == count
    assert spy.count == 2 * TINY.layers


def test_distinct_rows_are_found_once_each() -> None:
    rows = torch.tensor([[3.0, 1], [3, 1], [0, 2], [3, 1], [0, 2], [5, 5]])
    at, index = distinct(rows)
    assert sorted(at.tolist()) == [0, 2, 5]
    assert torch.equal(rows[at][index.long()], rows)


def test_image_context(spy: Spy) -> None:
    model = patched(IMAGE)
    image = torch.randn(1, 257, 64, generator=torch.Generator().manual_seed(3))
    text = torch.randn(1, 512, TINY.text, generator=torch.Generator().manual_seed(4))
    given: dict[str, Any] = {"encoder_hidden_states": text, "image": image}
    expected = run(model, **given)
    assert error(run(fused(model), **given), expected) < EXACT
    assert spy.count == IMAGE.layers
    assert error(run(model, **given | {"image": image.square()}), expected) > 1e-4  # the image counts


def test_rotations_that_are_written_in_place(spy: Spy) -> None:
    """As extrapolation to longer clips writes them."""
    model = patched()
    twin = fused(model)
    before = run(twin)
    for each in (model, twin):
        each.freqs[:, :8] = each.freqs[:, :8].conj()
    assert error(run(twin), run(model)) < EXACT < error(run(twin), before)
    assert spy.count


@torch.no_grad()
def test_sizes_that_a_caller_writes_into_one_tensor(spy: Spy) -> None:
    model = patched()
    twin = fused(model)
    grid, lengths = torch.tensor([[2, 4, 6]]), torch.tensor([TOKENS])
    x, steps, text = torch.randn(1, TOKENS, 128), torch.randn(1, 6, 128), torch.randn(1, 16, 128)

    def wrong() -> float:
        result, truth = (m.blocks[0](x, steps, lengths, grid, m.freqs, text, None) for m in (twin, model))
        return error(result, truth)

    assert wrong() < EXACT and spy.count == 1
    grid.copy_(torch.tensor([[2, 6, 4]]))
    assert wrong() < EXACT and spy.count == 2
    lengths.fill_(TOKENS - 8)
    with pytest.warns(RuntimeWarning, match="sequences are shorter"):
        assert wrong() < EXACT and spy.count == 2


def test_two_sizes_and_a_table_for_each(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int, int]] = []
    of_grid = _rotary.of_grid

    def counted(grid: tuple[int, int, int], freqs: torch.Tensor) -> torch.Tensor:
        made.append(grid)
        return of_grid(grid, freqs)

    monkeypatch.setattr(_rotary, "of_grid", counted)
    model = patched()
    twin = fused(model)
    wide = torch.randn(1, 16, 2, 4, 12, generator=torch.Generator().manual_seed(6))
    for _ in range(2):
        assert error(run(twin), run(model)) < EXACT
        assert error(run(twin, hidden_states=wide), run(model, hidden_states=wide)) < EXACT
    assert spy.count == 4 * TINY.layers
    assert made == [(3, 4, 4), (2, 2, 6)]
    scaled = torch.polar(torch.ones_like(twin.freqs.real), twin.freqs.angle() * 0.5)
    model.freqs = twin.freqs = scaled  # as tricks for longer clips do
    assert error(run(twin), run(model)) < EXACT and len(made) == 3


@pytest.mark.parametrize("release", ["2.1", "2.2"])
def test_a_blocks_end_makes_the_next_ones_first_norm(release: str, norms: list[int]) -> None:
    model = patched(Sizes(layers=3), release)
    twin = fused(model)
    for _ in range(2):
        norms.clear()
        assert error(run(twin), run(model)) < EXACT and len(norms) == 1


@pytest.mark.parametrize("release", ["2.1", "2.2"])
def test_padding_takes_the_hosts_forward_and_says_so_once(release: str, spy: Spy) -> None:
    model = patched(release=release)
    twin = fused(model)
    plain = run(twin)
    model.padding = twin.padding = 5
    with pytest.warns(RuntimeWarning, match="part of the tokens are padding"):
        result = run(twin)
    assert spy.count == TINY.layers
    assert error(result, run(model)) < EXACT and error(result, plain) < EXACT
    for twin.padding in (5, 7):
        run(twin)  # warnings are errors here
    twin.padding = 0
    assert torch.equal(run(twin), plain)


def test_a_masked_text_takes_the_hosts_forward(spy: Spy) -> None:
    model = patched()
    twin = fused(model)
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(1, TOKENS, 128, generator=generator), torch.randn(1, 6, 128, generator=generator)
    context = torch.randn(1, 16, 128, generator=generator)
    given = (e, torch.tensor([TOKENS]), torch.tensor([[3, 4, 4]]), model.freqs, context)
    with pytest.warns(RuntimeWarning, match="context_lens"), torch.no_grad():
        result = twin.blocks[0](x, *given, torch.tensor([9]))
    assert spy.count == 0
    with torch.no_grad():
        assert error(result, model.blocks[0](x, *given, torch.tensor([9]))) < EXACT
        assert error(twin.blocks[0](x, *given, None), result) > 1e-4


def test_the_stream_is_fp32_under_autocast_as_in_the_release(spy: Spy) -> None:
    truth = run(original.transformer())
    model: Any = original.transformer(torch.bfloat16).requires_grad_(False)
    wan_runtime.patch(model, weights="fp8")
    twin = fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        own, ours = run(model), run(twin)
    assert spy.results == [torch.float32] * TINY.layers
    assert error(ours, truth) < 1.1 * error(own, truth) + 1e-3 < 0.06


def coded(model: Any) -> Any:
    """The model planned as it would be on a GPU: its products take e4m3 codes (torch multiplies those on a CPU too)."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.compute = "fp8"
            module._bind()
            assert takes_codes(module)
    return model


@pytest.mark.parametrize("release", ["2.1", "2.2"])
def test_products_that_take_codes(release: str, spy: Spy) -> None:
    model = patched(release=release)
    expected = run(model)
    twin = coded(fused(model))
    result = run(twin)
    assert spy.count == TINY.layers
    assert 1e-3 < error(result, expected) < 0.06
    assert torch.equal(run(twin), result)
    shared = twin.blocks[0].__dict__[MEMO].shared
    assert set(shared.prompts[0].made) == {0, 1}  # K and V of the prompt are kept


def test_a_checkpoint_runs_fused(tmp_path: Path, spy: Spy) -> None:
    path = files.comfy_scaled_fp8(state(), block_linears(), "fp8").write(tmp_path)
    model = original.transformer(seed=5).requires_grad_(False)
    wan_runtime.patch(model, path, compute="fp32")
    assert error(run(fused(model)), run(model)) < EXACT
    assert spy.count == TINY.layers


def test_a_wrapped_layer_and_a_hooked_one_are_called(spy: Spy) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = patched()
    twin = fused(model)
    for each in (model, twin):
        torch.manual_seed(1)
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=r"blocks.*(\.q|\.v|ffn\.2)", init_lora_weights=False), each
        )
        each.requires_grad_(False)
    expected = run(model)
    assert error(expected, run(patched())) > 0.01  # the adapter does something
    calls: list[int] = []
    twin.blocks[1].cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    assert error(run(twin), expected) < EXACT and spy.count == TINY.layers
    assert len(calls) == 1
    assert _original_block.fuse(twin, "TWINS") == [
        "11 Linears of the blocks are wrapped by an adapter or carry a hook: they are called as they are, and quantise "
        "their own input."
    ]


def _hook(model: Any) -> None:
    model.blocks[0].self_attn.norm_q.register_forward_hook(lambda *_: None)


def _replaced(model: Any) -> None:
    """As the release's own sequence parallelism does."""
    attention = model.blocks[0].self_attn
    own = type(attention).forward
    attention.forward = MethodType(lambda module, *args, **kwargs: own(module, *args, **kwargs), attention)


@pytest.mark.parametrize(
    ("obstacle", "why"),
    [(_hook, "carries a forward hook"), (_replaced, "WanSelfAttention carries a forward that was put")],
)
def test_what_something_else_holds_takes_the_hosts_forward(obstacle: Any, why: str, spy: Spy) -> None:
    model = patched()
    twin = fused(model)
    obstacle(twin)
    with pytest.warns(RuntimeWarning, match=why):
        result = run(twin)
    assert error(result, run(model)) < EXACT
    assert spy.count == TINY.layers - 1
    notes = _original_block.fuse(twin, "TWINS")
    assert (
        len(notes) == 1
        and why in notes[0]
        and notes[0].startswith("1 of 2 blocks run the host's own forward")
    )


def test_gradients_and_a_cpu_without_the_twins_take_the_hosts_forward(spy: Spy) -> None:
    model = patched()
    twin = copy.deepcopy(model)
    install(twin, "sdpa", FP32)
    assert any("need a GPU" in note for note in _original_block.fuse(twin))
    assert error(run(twin), run(model)) < EXACT and spy.count == 0
    twin.blocks[0].norm3.weight.requires_grad_(True)
    notes = _original_block.fuse(twin, "TWINS")
    assert notes == ["1 of 2 blocks run the host's own forward: gradients are on."]
    given = diffusers.inputs()
    model.blocks[0].norm3.weight.requires_grad_(True)
    for each in (model, twin):
        each(given["hidden_states"], given["timestep"], given["encoder_hidden_states"]).sum().backward()
    gradients = [each.blocks[0].norm3.weight.grad for each in (twin, model)]
    assert error(*gradients) < EXACT and spy.count == 0  # block 1 would cut it


@pytest.mark.parametrize("sizes", [TINY, IMAGE])
def test_our_attention_without_the_fused_forward(sizes: Sizes) -> None:
    model = original.transformer(sizes=sizes).requires_grad_(False)
    text = torch.randn(1, 512, TINY.text, generator=torch.Generator().manual_seed(4))
    given: dict[str, Any] = {"encoder_hidden_states": text}
    if sizes.image:
        given["image"] = torch.randn(1, 257, 64, generator=torch.Generator().manual_seed(3))
    expected = run(model, **given)
    report = wan_runtime.patch(model, weights="keep", attention="sdpa")
    assert report.attention == "sdpa"
    assert error(run(model, **given), expected) < EXACT
    model.padding = 3
    assert error(run(model, **given), expected) < EXACT
    with pytest.raises(BackendUnavailable, match="Hopper"):
        wan_runtime.patch(original.transformer(), attention="fa3")


def test_a_copy_and_a_pickle_run_fused_and_share_nothing(spy: Spy) -> None:
    twin = fused(patched(release="2.2"))
    expected = run(twin)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        spy.count = 0
        assert torch.equal(run(other), expected) and spy.count == TINY.layers
        theirs = {id(block.__dict__[MEMO].shared) for block in other.blocks}
        assert len(theirs) == 1 and id(twin.blocks[0].__dict__[MEMO].shared) not in theirs


@pytest.mark.parametrize("release", ["2.1", "2.2"])
def test_unpatch_takes_it_all_off(release: str) -> None:
    model = original.transformer(release=release)
    before = [(path, type(module)) for path, module in model.named_modules()]
    keys = {path: set(module.__dict__) for path, module in model.named_modules()}
    plain = run(model)
    wan_runtime.patch(model, attention="sdpa", weights="keep")
    _original_block.fuse(model, "TWINS")
    run(model)
    wan_runtime.unpatch(model)
    assert [(path, type(module)) for path, module in model.named_modules()] == before
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == keys
    assert torch.equal(run(model), plain)
