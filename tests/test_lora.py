"""LoRA on a patched model, through PEFT and diffusers' own loader: floating-point adapters beside quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

import wan_runtime
from tests.hosts.diffusers import error, latents, pipeline, run, transformer
from wan_runtime.errors import InvalidOption, QuantisedWeight
from wan_runtime.linear import QuantLinear

RANK = 4
TARGETS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_v", "blocks.1.ffn.net.0.proj")
RESIDENT = "condition_embedder.time_proj"


def lora(path: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a LoRA in diffusers' format; returns each module's B @ A."""
    generator = torch.Generator().manual_seed(seed)
    model = transformer()
    state: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name in (*TARGETS, RESIDENT):
        out, inp = model.get_submodule(name).weight.shape
        a, b = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((RANK, inp), (out, RANK)))
        state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        deltas[name] = b @ a
    save_file(state, path)
    return deltas


def merged(model: Any, deltas: dict[str, torch.Tensor]) -> Any:
    """The oracle: a plain model whose weights are W + B A."""
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight.add_(delta)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def load_lora(model: nn.Module, file: Path) -> Any:
    pipe = pipeline(model)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipe


def patched(**options: Any) -> Any:
    model = transformer()
    wan_runtime.patch(model, backend="reference", **options)
    return model.to(torch.float32)  # what is compared is arithmetic, not bf16 rounding


def adapters(model: nn.Module) -> list[LoraLayer]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_lora_on_a_patched_model_has_its_full_effect(weights: str, file: Path) -> None:
    deltas = lora(file)
    bare = run(patched(weights=weights))
    model = patched(weights=weights)
    load_lora(model, file)
    assert len(adapters(model)) == len(deltas)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    # Oracle: the same quantised weights, dequantised, with B @ A added.
    plain = patched(weights=weights)
    wan_runtime.unpatch(plain)
    truth = run(merged(plain, deltas))
    assert error(bare, truth) > 0.1, "the LoRA is too weak to show"
    assert error(run(model), truth) < 1e-5


def test_adapters_are_bf16_in_a_bf16_model(file: Path) -> None:
    lora(file)
    model = transformer(torch.bfloat16)
    wan_runtime.patch(model)
    pipe = load_lora(model, file)
    beside = {
        (isinstance(layer.get_base_layer(), QuantLinear), layer.lora_A["default_0"].weight.dtype)
        for layer in adapters(model)
    }
    assert beside == {
        (True, torch.bfloat16),
        (False, torch.float32),
    }  # as their Linear is: resident ones fp32
    assert latents(pipe).isfinite().all()
    assert error(run(model, torch.bfloat16), run(patched())) > 0.1


def test_unloading_gives_the_patched_model_back(file: Path) -> None:
    lora(file)
    model = patched()
    before, keys = run(model), list(model.state_dict())
    pipe = load_lora(model, file)
    assert not torch.equal(run(model), before)
    pipe.set_adapters(["default_0"], adapter_weights=[0.0])
    assert torch.equal(run(model), before)
    pipe.unload_lora_weights()
    assert not adapters(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), before)


def test_patching_a_model_that_has_a_lora(file: Path) -> None:
    deltas = lora(file)
    model = transformer()
    pipe = load_lora(model, file)
    report = wan_runtime.patch(model, backend="reference")
    model.to(torch.float32)
    assert len(report.quantised) == 20
    after = pipeline(patched())
    after.load_lora_weights(str(file.parent), weight_name=file.name)
    assert torch.equal(run(model), run(after.transformer))
    assert len(adapters(model)) == len(deltas)
    pipe.unload_lora_weights()
    assert torch.equal(run(model), run(patched()))
    wan_runtime.unpatch(model)
    assert list(model.state_dict()) == list(transformer().state_dict())


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_unpatching_keeps_the_lora(loaded: str, file: Path) -> None:
    deltas = lora(file)
    model = transformer()
    if loaded == "before":
        load_lora(model, file)
    wan_runtime.patch(model)
    if loaded == "after":
        load_lora(model, file)
    wan_runtime.unpatch(model)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    plain = patched()
    wan_runtime.unpatch(plain)
    assert error(run(model), run(merged(plain, deltas))) < 1e-2  # adapters loaded after the patch are bf16
    assert len(adapters(model)) == len(deltas)


def test_a_file_loads_into_a_model_that_has_a_lora(file: Path, tmp_path: Path) -> None:
    from tests.hosts.diffusers import checkpoint

    deltas = lora(file)
    model = transformer(seed=3)
    load_lora(model, file)
    wan_runtime.patch(model, checkpoint(tmp_path / "model.safetensors"), weights="keep")
    model.to(torch.float32)
    assert error(run(model), run(merged(transformer(), deltas))) < 1e-2


@pytest.mark.parametrize("weights", ["fp8", "keep"])
def test_merging_the_projections_is_refused_before_any_is(weights: str) -> None:
    model: Any = transformer(torch.bfloat16)
    wan_runtime.patch(model, weights=weights)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InvalidOption, match="unquantised copy"):
        model.fuse_qkv_projections()
    assert [name for name, _ in model.named_modules()] == names
    wan_runtime.unpatch(model)
    model.fuse_qkv_projections()
    assert run(model, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("safe", [True, False])
def test_fusing_into_quantised_weights_is_refused(safe: bool, file: Path) -> None:
    lora(file)
    model = patched()
    pipe = load_lora(model, file)
    before, held = run(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(QuantisedWeight, match="adapter beside the layer"):
        pipe.fuse_lora(safe_fusing=safe)
    for layer in adapters(model):
        if isinstance(layer.get_base_layer(), QuantLinear):
            with pytest.raises(QuantisedWeight):
                layer.merge(safe_merge=safe)
        assert not layer.merged
    assert torch.equal(run(model), before)
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
