"""The fused block forward inside diffusers' own models: the kernels' plain-torch twins on the CPU, in fp32, against the
host's forward of the same patched model."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests.builders.wan import TINY, Sizes
from tests.hosts.diffusers import error, inputs, transformer
from tests.hosts.training import add_lora, gradients, joined
from wan_runtime.attention import ATTENTIONS
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.kernels import ops
from wan_runtime.linear import QuantLinear
from wan_runtime.patches import _wan_block
from wan_runtime.patches._attention_processor import Processor
from wan_runtime.patches._fused import takes_codes
from wan_runtime.patches._sharing import MEMO
from wan_runtime.residents import kind_of

IMAGE = Sizes(image=64)
CHECKS = ("test_schema", "test_faketensor")
EXACT = 2e-5  # fp32 sums in another order


def patched(sizes: Sizes = TINY, **options: Any) -> Any:
    model = transformer(sizes=sizes)
    wan_runtime.patch(model, attention="sdpa", **options)
    return model.to(torch.float32)


def fused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    assert _wan_block.fuse(twin, "TWINS") == [] or torch.is_grad_enabled()
    return twin


@torch.no_grad()
def run(model: Any, **changes: Any) -> torch.Tensor:
    result: torch.Tensor = model(**{**inputs(batch=changes.pop("batch", 1)), **changes})[0]
    return result


class Spy:
    """Counts the blocks that ran fused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        ran = _wan_block.run

        def counted(*args: Any) -> torch.Tensor:
            self.count += 1
            return ran(*args)

        monkeypatch.setattr(_wan_block, "run", counted)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize("options", [{"weights": "fp8"}, {"weights": "nvfp4"}, {"weights": "keep"}])
@pytest.mark.parametrize("batch", [1, 2])
def test_text_to_video(options: dict[str, Any], batch: int, spy: Spy) -> None:
    model = patched(**options)
    expected = run(model, batch=batch)
    assert spy.count == 0
    assert error(run(fused(model), batch=batch), expected) < EXACT
    assert spy.count == TINY.layers


def test_no_pass_adds_the_bias_of_an_unquantised_linear_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(weights="keep")
    expected = run(model)
    twin = fused(model)
    block = twin.blocks[1]
    linears = {m for b in twin.blocks for m in b.modules() if kind_of(m) == "linear"}
    assert len(linears) == 10 * TINY.layers
    called = [block.attn2.to_out[0], block.ffn.net[2]]
    seen: list[nn.Module] = []
    for cls in {type(module) for module in linears}:
        whole: Any = cls.forward

        def called_whole(module: nn.Module, *args: Any, whole: Any = whole) -> Any:
            seen.append(module)
            return whole(module, *args)

        monkeypatch.setattr(cls, "forward", called_whole)
    assert error(run(twin), expected) < EXACT
    assert not seen
    # Whoever hangs a hook on a layer, or gives it a forward, expects it to be called, with its bias in.
    called[0].register_forward_hook(lambda *_: None)
    own = called[1].forward
    called[1].forward = lambda x: own(x)
    assert error(run(twin), expected) < EXACT
    assert seen == called


@pytest.mark.parametrize("distinct", [1, 2, 12])
def test_a_timestep_a_token(distinct: int, spy: Spy) -> None:
    model = patched()
    tokens = 3 * 4 * 4
    timestep = (torch.arange(tokens) % distinct * 70.0 + 3)[None]
    expected = run(model, timestep=timestep)
    assert error(run(fused(model), timestep=timestep), expected) < EXACT
    both = torch.cat((timestep, timestep.flip(1)))
    assert error(run(fused(model), timestep=both, batch=2), run(model, timestep=both, batch=2)) < EXACT
    assert spy.count == 2 * TINY.layers


def test_distinct_timesteps_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused(patched())
    seen = []
    model.condition_embedder.time_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[0])
    )
    tokens = 3 * 4 * 4
    run(model, timestep=(torch.arange(tokens) < 16)[None] * 500.0)
    assert seen == [2]


def test_image_context(spy: Spy) -> None:
    model = patched(IMAGE)
    image = torch.randn(1, 257, 64, generator=torch.Generator().manual_seed(3))
    text = torch.randn(1, 512, TINY.text, generator=torch.Generator().manual_seed(4))
    arguments = {"encoder_hidden_states_image": image, "encoder_hidden_states": text}
    assert error(run(fused(model), **arguments), run(model, **arguments)) < EXACT
    assert spy.count == IMAGE.layers


def test_an_image_model_without_an_image() -> None:
    model = patched(IMAGE)
    text = torch.randn(1, 512, TINY.text, generator=torch.Generator().manual_seed(4))
    assert (
        error(run(fused(model), encoder_hidden_states=text), run(model, encoder_hidden_states=text)) < EXACT
    )


def test_a_text_of_no_tokens(spy: Spy) -> None:
    model = patched()
    empty = torch.zeros(1, 0, TINY.text)
    twin = fused(model)
    result = run(twin, encoder_hidden_states=empty)
    assert error(result, run(model, encoder_hidden_states=empty)) < EXACT
    assert spy.count == TINY.layers


def test_vace(spy: Spy) -> None:
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=TINY.text,
        freq_dim=32, ffn_dim=256, num_layers=2, vace_layers=[0, 1], vace_in_channels=96,
    ).eval().requires_grad_(False)  # fmt: skip
    wan_runtime.patch(model, attention="sdpa", weights="fp8")
    model.to(torch.float32)
    control = torch.randn(1, 96, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = run(model, control_hidden_states=control)
    assert error(run(fused(model), control_hidden_states=control), expected) < EXACT
    assert spy.count == 4


def coded(model: Any) -> Any:
    """The model planned as it would be on a GPU: its products take e4m3 codes (torch multiplies those on a CPU too)."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.compute = "fp8"
            module._bind()
            assert takes_codes(module)
    return model


def test_products_that_take_codes(spy: Spy) -> None:
    model = patched()
    expected = run(model)
    result = run(coded(fused(model)))
    assert spy.count == TINY.layers
    assert (
        1e-3 < error(result, expected) < 0.06
    )  # what e4m3 activations cost, and not what a lost bias or scale would


@pytest.mark.parametrize("left_out", ["blocks.0.attn1.to_k", "blocks.0.ffn.net.2", "blocks.1.attn2.to_out.0"])
def test_one_layer_that_takes_plain_rows_among_codes(left_out: str) -> None:
    model = patched()
    mixed = coded(fused(model))
    mixed.get_submodule(left_out).compute = "bf16"
    mixed.get_submodule(left_out)._bind()
    assert not takes_codes(mixed.get_submodule(left_out))
    assert error(run(mixed), run(model)) < 0.06


def test_a_quantised_layer_s_forward_that_was_replaced_is_called() -> None:
    twin = coded(fused(patched()))
    layer = twin.get_submodule("blocks.0.ffn.net.2")
    layer.forward = Mock(wraps=layer.forward)
    assert not takes_codes(layer)
    assert error(run(twin), run(patched())) < 0.06
    layer.forward.assert_called_once()


def test_operators_say_the_shapes_they_give() -> None:
    x, table = torch.randn(6, 48), torch.randn(1, 6, 48)
    index = torch.zeros(6, dtype=torch.int32)
    bias, one = torch.randn(48), table[:, 0]
    opcheck = torch.library.opcheck
    for codes in (True, False):
        opcheck(ops._norm_modulate_op, (x, one, table[:, 1], 1e-6, 1.0, index, codes), test_utils=CHECKS)
        opcheck(ops._gelu_quantize_op, (x, bias, codes), test_utils=CHECKS)
        opcheck(ops._attention_output_op, (x, None, x.clone(), codes), test_utils=CHECKS)
        opcheck(ops._norm_rope_op, (x, bias, bias, 1e-6, torch.randn(6, 16), codes), test_utils=CHECKS)
        for factor in (one, None):
            arguments = (x, bias, one, x.clone(), None, factor, factor, 1e-6, 1.0, None, codes)
            opcheck(ops._residual_norm_op, arguments, test_utils=CHECKS)
    opcheck(ops._quantize_heads_op, (torch.randn(2, 5, 3, 16),), test_utils=CHECKS)


def test_a_wrapped_layer_is_called_and_its_adapter_counts(spy: Spy) -> None:
    from peft import LoraConfig

    model = patched()
    twin = fused(model)
    for each in (model, twin):
        torch.manual_seed(1)
        each.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
        each.requires_grad_(False)
    plain = run(model)
    assert error(run(twin), plain) < EXACT and spy.count == TINY.layers
    model.disable_adapters()
    assert error(run(model), plain) > 0.01  # the adapter does something


def test_an_adapter_that_was_there_before_is_in_the_notes() -> None:
    from peft import LoraConfig

    model = patched()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model.requires_grad_(False)
    assert _wan_block.fuse(model, "TWINS") == [
        "4 Linears of the blocks are wrapped by an adapter or carry a hook: they are called as they are, and quantise "
        "their own input."
    ]


def test_a_copy_and_a_pickle_run_fused_and_share_nothing(spy: Spy) -> None:
    twin = fused(patched())
    expected = run(twin)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        spy.count = 0
        assert torch.equal(run(other), expected) and spy.count == TINY.layers
        theirs = {id(block.__dict__[MEMO].shared) for block in other.blocks}
        assert len(theirs) == 1 and id(twin.blocks[0].__dict__[MEMO].shared) not in theirs


def _hook_norm(model: Any) -> None:
    model.blocks[0].attn1.norm_q.register_forward_hook(lambda *_: None)


def _processor(model: Any) -> None:
    model.blocks[0].attn1.processor = model.blocks[0].attn1.processor.replaced


def _backend(model: Any) -> None:
    model.blocks[0].attn1.set_attention_backend("native")


def _gradients(model: Any) -> None:
    model.blocks[0].norm2.weight.requires_grad_(True)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("obstacle", [_hook_norm, _processor, _backend])
def test_what_something_else_holds_takes_the_hosts_forward(obstacle: Any, spy: Spy) -> None:
    model = patched()
    twin = fused(model)
    obstacle(twin)
    assert error(run(twin), run(model)) < EXACT
    assert spy.count == TINY.layers - 1


@pytest.mark.parametrize(
    "part", ["ffn.net.0", "ffn.net.1", "attn1.to_out.1", "attn2.to_out.1", "attn2.norm_q", "norm3"]
)
def test_a_hook_on_what_the_kernels_stand_for_is_called(part: str, spy: Spy) -> None:
    model = patched()
    twin = fused(model)
    called = Mock(return_value=None)
    twin.blocks[0].get_submodule(part).register_forward_hook(called)
    assert error(run(twin), run(model)) < EXACT
    called.assert_called_once()
    assert spy.count == TINY.layers - 1


class ScaledBlock(WanTransformerBlock):  # type: ignore[misc]
    """A fork's block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * 1.5


class ScaledNorm(nn.RMSNorm):
    """A fork's norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


def _block(block: Any) -> None:
    block.__class__ = ScaledBlock


def _norm(block: Any) -> None:
    block.attn1.norm_q.__class__ = ScaledNorm


def _identity(block: Any) -> None:
    block.attn1.norm_q = nn.Identity()


def _exact_gelu(block: Any) -> None:
    block.ffn.net[0].approximate = "none"


def _weighted_norm(block: Any) -> None:
    block.norm1 = nn.LayerNorm(block.norm1.normalized_shape)
    nn.init.constant_(block.norm1.weight, 1.5)


def _dropout(block: Any) -> None:
    block.ffn.net[1].p = 1.0
    block.ffn.net[1].train()


FORKS = {
    _block: "its ScaledBlock has a forward of its own",
    _norm: "its ScaledNorm has a forward of its own",
    _identity: "normalised by Identity",
    _exact_gelu: "not Linear, tanh GELU, Linear",
    _weighted_norm: "not a LayerNorm without weights",
    _dropout: "it drops activations",
}


@pytest.mark.parametrize("change", FORKS)
@torch.no_grad()
def test_a_fork_s_block_takes_its_own_forward(change: Any, spy: Spy) -> None:
    model = transformer()
    change(model.blocks[0])
    wan_runtime.patch(model, attention="sdpa")
    twin = copy.deepcopy(model)
    (note,) = _wan_block.fuse(twin, "TWINS")
    assert note.startswith("1 of 2 blocks run the host's own forward: ") and FORKS[change] in note
    assert error(run(twin), run(model)) < EXACT
    assert spy.count == TINY.layers - 1
    wan_runtime.unpatch(twin)


def test_a_forward_that_a_script_gave_all_blocks_is_not_passed_by(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = WanTransformerBlock.forward
    monkeypatch.setattr(WanTransformerBlock, "forward", lambda *args: forward(*args) * 1.5)
    model = patched()
    twin = copy.deepcopy(model)
    (note,) = _wan_block.fuse(twin, "TWINS")
    assert (
        "2 of 2 blocks run the host's own forward: its WanTransformerBlock has a forward of its own" in note
    )
    assert error(run(twin), run(model)) < EXACT and spy.count == 0


def test_training_after_inference_at_the_same_size() -> None:
    model = patched()
    twin = fused(model)
    found = []
    for each in (model, twin):
        add_lora(each, ["to_q"])
        with torch.inference_mode():
            each(**inputs())
        found.append(joined(gradients(each, inputs())))
    assert error(found[1], found[0]) < EXACT


def test_gradients_flow_through_the_hosts_forward(spy: Spy) -> None:
    twin = patched()
    twin.blocks[0].norm2.weight.requires_grad_(True)
    notes = _wan_block.fuse(twin, "TWINS")
    assert any("gradients" in note for note in notes)
    model = patched()
    model.blocks[0].norm2.weight.requires_grad_(True)
    for each in (model, twin):
        each(**inputs())[0].sum().backward()
    gradients = [each.blocks[0].norm2.weight.grad for each in (twin, model)]
    assert error(*gradients) < EXACT and spy.count == 0  # block 1, whose input alone wants one, would cut it


def test_without_the_twins_a_cpu_takes_the_hosts_forward(spy: Spy) -> None:
    model = patched()
    twin = copy.deepcopy(model)
    assert any("need a GPU" in note for note in _wan_block.fuse(twin))
    assert torch.equal(run(twin), run(model)) and spy.count == 0


def test_unpatch_takes_it_all_off() -> None:
    model = transformer()
    before = [(path, type(module)) for path, module in model.named_modules()]
    keys = {path: set(module.__dict__) for path, module in model.named_modules()}
    wan_runtime.patch(model, attention="sdpa")
    _wan_block.fuse(model, "TWINS")
    run(model)
    assert isinstance(model.blocks[0].attn1.processor, Processor)
    wan_runtime.unpatch(model)
    assert [(path, type(module)) for path, module in model.named_modules()] == before
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == keys
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_a_model_without_blocks_cannot_be_fused() -> None:
    with pytest.raises(InvalidOption, match="no WAN block"):
        _wan_block.fuse(nn.Linear(2, 2))


def test_the_choice_of_attention_is_kept_or_refused() -> None:
    model = transformer()
    with pytest.raises(BackendUnavailable, match=r"fa3.*Hopper"):
        wan_runtime.patch(model, attention="fa3")
    with pytest.raises(BackendUnavailable, match=r"cudnn.*needs a GPU"):
        wan_runtime.patch(model, attention="cudnn")
    with pytest.raises(InvalidOption, match="auto, cudnn, fa3, fp8, sdpa"):
        wan_runtime.patch(model, attention="flash")
    report = wan_runtime.patch(model, attention="sdpa")
    assert report.attention == "sdpa" and report.fused is False
    assert "attention: sdpa" in str(report)
    model = transformer()
    assert wan_runtime.patch(model).attention is None
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_a_model_moved_from_what_attention_was_chosen_for_gets_sdpa() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    for planned in (("cuda", torch.float32), ("cpu", torch.float16)):  # FlashAttention 3 would refuse either
        result = Processor("fa3", planned, None).attend(q, k, v)
        assert torch.equal(result, ATTENTIONS["sdpa"].attend(q, k, v))


def test_our_processor_is_the_hosts_where_it_is_not_fused() -> None:
    plain = transformer()
    expected = run(plain)
    model = transformer()
    wan_runtime.patch(model, weights="keep", attention="sdpa")
    assert error(run(model.to(torch.float32)), expected) < EXACT
