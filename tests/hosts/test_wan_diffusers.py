"""Every variant that diffusers has a class for: names, configuration, and one forward of a quantised file.

The oracle is diffusers throughout: its single-file converter for the names, its classes for the keys and for what the
model computes from the dequantised weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.files import Content
from tests.hosts.diffusers import error
from tests.hosts.variants import MODELS, State, built, converted, kernels, linears, original, run
from wan_runtime.errors import InvalidOption, UnaccountedTensors
from wan_runtime.linear import QuantLinear
from wan_runtime.names import SPELLINGS, Variant, from_original, variant_of
from wan_runtime.patches import HOSTS
from wan_runtime.swap import patched_state


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def quantised(name: str, writer: files.Writer, weight_format: str, seed: int = 0) -> tuple[Content, State]:
    """A file under original names, and the state dict that diffusers makes of the weights it means."""
    tensors = original(built(name, seed).state_dict())
    content = writer({**tensors, **kernels(tensors)}, linears(tensors), weight_format)
    meant = {f"{path}.weight": torch.from_numpy(w).float() for path, w in content.weights.items()}
    return content, converted({**tensors, **meant})


def test_the_original_names_are_those_of_diffusers_converter(name: str) -> None:
    state = built(name).state_dict()
    theirs = converted(original(state))
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[key], state[key]) for key in state)
    spelled = {from_original(SPELLINGS["diffusers"], key) for key in original(state)}
    fused = {key for key in spelled if ".linear1_kv." in key}
    assert spelled - fused <= state.keys()
    assert bool(fused) == (name == "animate")


def test_the_model_that_a_file_describes_has_the_keys_and_shapes_of_diffusers(name: str) -> None:
    model = built(name)
    shapes = {key: tuple(t.shape) for key, t in original(model.state_dict()).items()}
    variant = variant_of(Path("file"), shapes)
    assert variant.kind == MODELS[name].kind
    build = HOSTS["wan_diffusers"].build
    assert build is not None
    described = build(variant)
    assert type(described) is type(model)
    assert all(p.is_meta for p in described.parameters())
    assert {k: t.shape for k, t in described.state_dict().items()} == {
        k: t.shape for k, t in model.state_dict().items()
    }
    for key in ("num_attention_heads", "in_channels", "out_channels", "added_kv_proj_dim", "vace_layers"):
        assert getattr(described.config, key, None) == getattr(model.config, key, None)


@pytest.mark.parametrize(
    ("writer", "weight_format"), [(files.comfy_scaled_fp8, "fp8"), (files.comfy, "nvfp4")]
)
def test_a_quantised_file_computes_what_diffusers_does_with_its_weights(
    name: str, writer: files.Writer, weight_format: str, tmp_path: Path
) -> None:
    content, meant = quantised(name, writer, weight_format)
    truth = built(name, seed=5)
    truth.load_state_dict(meant)
    path = content.write(tmp_path)
    model = wan_runtime.load(path, device="cpu", dtype=torch.float32, compute="fp32", backend="reference")
    assert error(run(model, name), run(truth, name)) < 1e-4
    held = [m for m in model.modules() if isinstance(m, QuantLinear)]
    halves = sum(".linear1_kv" in path for path in content.weights)
    assert len(held) == len(content.weights) + halves
    assert {m.format for m in held} == {weight_format}


def test_a_model_of_the_script_takes_the_file(name: str, tmp_path: Path) -> None:
    content, meant = quantised(name, files.comfy_scaled_fp8, "fp8")
    truth = built(name, seed=5)
    truth.load_state_dict(meant)
    model = built(name, seed=6)
    wan_runtime.patch(model, content.write(tmp_path), compute="fp32", backend="reference")
    model.to(torch.float32)
    assert error(run(model, name), run(truth, name)) < 1e-4
    wan_runtime.unpatch(model)
    assert model.state_dict().keys() == meant.keys()
    assert all(torch.allclose(t, meant[k], atol=1e-6) for k, t in model.state_dict().items())


def test_what_diffusers_keeps_in_fp32_stays_fp32_in_a_bf16_model(name: str, tmp_path: Path) -> None:
    content, meant = quantised(name, files.comfy_scaled_fp8, "fp8")
    model = wan_runtime.load(content.write(tmp_path), device="cpu")
    assert model.dtype == torch.bfloat16
    for key, parameter in model.named_parameters():
        if any(part in key.split(".") for part in type(model)._keep_in_fp32_modules):
            assert parameter.dtype == torch.float32, key
    truth = built(name, seed=5)
    truth.load_state_dict(meant)
    assert run(model, name, torch.bfloat16).dtype == torch.bfloat16
    assert error(run(model, name, torch.bfloat16), run(truth, name)) < 0.05


def test_without_a_file_vace_blocks_are_quantised_and_the_face_adapter_is_not() -> None:
    for name, where, quantises in (("vace", "vace_blocks", True), ("animate", "face_adapter", False)):
        model = built(name)
        wan_runtime.patch(model)
        inside = {type(m) for p, m in model.named_modules() if p.startswith(where) and p.endswith("to_q")}
        assert any(issubclass(kind, QuantLinear) for kind in inside) == quantises
        kept = [m for p, m in model.named_modules() if p.endswith((".proj_in", ".proj_out"))]
        assert not any(isinstance(m, QuantLinear) for m in kept)


@pytest.mark.parametrize("kind", ["s2v", "humo", "fun_camera", "fun_control"])
def test_a_kind_without_a_class_is_named(kind: str) -> None:
    build = HOSTS["wan_diffusers"].build
    assert build is not None
    variant = Variant("some model", 128, 256, 2, 16, 16, 32, 32, kind=kind)
    with pytest.raises(InvalidOption, match=r"some model, and diffusers has no class.*wan_runtime\.patch"):
        build(variant)


def test_a_file_of_another_variant_is_refused_with_its_name(tmp_path: Path) -> None:
    content, _ = quantised("vace", files.comfy_scaled_fp8, "fp8")
    model = built("t2v")
    with pytest.raises(UnaccountedTensors, match="VACE"):
        wan_runtime.patch(model, content.write(tmp_path))
    assert patched_state(model) is None
