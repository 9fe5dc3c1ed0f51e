"""Hosts under the original release's names: the release's tree with its fp32 asserts, and DiffSynth's real class."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.wan import TINY, block_linears, state
from tests.hosts import diffusers, original
from wan_runtime.arming import install
from wan_runtime.linear import QuantLinear
from wan_runtime.patches import host_of
from wan_runtime.swap import patched_state


def run(model: torch.nn.Module, *, autocast: bool = False) -> torch.Tensor:
    given = diffusers.inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result: torch.Tensor = model(
            given["hidden_states"], given["timestep"], given["encoder_hidden_states"]
        )
    return result


def test_the_tree_computes_what_diffusers_computes() -> None:
    """The oracle of everything below: two independent implementations, one state; attention is bf16 in one of them."""
    assert diffusers.error(run(original.transformer()), diffusers.run(diffusers.transformer())) < 5e-3


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_the_releases_fp32_asserts_hold_in_a_patched_bf16_model(weights: str, autocast: bool) -> None:
    truth = run(original.transformer())
    model: Any = original.transformer(torch.bfloat16)
    with pytest.raises((RuntimeError, AssertionError)):
        run(model)  # as it is, a bf16 model of the release runs under no dtype
    report = wan_runtime.patch(model, weights=weights)
    assert report.host == "wan_original" and len(report.quantised) == 20
    assert model.dtype == torch.bfloat16
    assert diffusers.error(run(model, autocast=autocast), truth) < (0.05 if weights == "fp8" else 0.12)
    model.to(torch.bfloat16)
    assert diffusers.error(run(model, autocast=autocast), truth) < (0.05 if weights == "fp8" else 0.12)


def test_autocast_keeps_its_memory_saving() -> None:
    """The release feeds its Linears fp32 under bf16 autocast; q, k and v must come out in bf16."""
    model = original.transformer(torch.bfloat16)
    wan_runtime.patch(model)
    seen: list[torch.dtype] = []
    for name in ("q", "v"):
        layer = model.get_submodule(f"blocks.0.self_attn.{name}")
        layer.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    run(model, autocast=True)
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_file_of_either_spelling_loads(spelling: str, tmp_path: Path) -> None:
    content = files.comfy_scaled_fp8(state(spelling=spelling), block_linears(spelling=spelling), "fp8")
    path = content.write(tmp_path)
    model = original.transformer(seed=5)
    wan_runtime.patch(model, path, compute="fp32")
    twin = diffusers.transformer(seed=5)
    wan_runtime.patch(twin, path, compute="fp32")
    twin.to(torch.float32)
    assert diffusers.error(run(model), diffusers.run(twin)) < 5e-3


def test_unpatch() -> None:
    model = original.transformer()
    keys, types_ = list(model.state_dict()), [type(m) for m in model.modules()]
    wan_runtime.patch(model)
    wan_runtime.unpatch(model)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, types_)


@pytest.fixture
def diffsynth() -> Iterator[None]:
    """DiffSynth-Studio's own modules. Its packages' __init__ import the whole studio (torchvision, modelscope, ...), so
    the packages are stood up bare; what WanModel needs is real."""
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("diffsynth is not installed")
    where = Path(next(iter(spec.submodule_search_locations)))
    for package in ("", "models", "core"):
        module = types.ModuleType(f"diffsynth.{package}".rstrip("."))
        module.__path__ = [str(where / package)]
        sys.modules[module.__name__] = module
    yield
    for name in [n for n in sys.modules if n == "diffsynth" or n.startswith("diffsynth.")]:
        del sys.modules[name]


def dit(module: Any) -> Any:
    model = module.WanModel(
        dim=TINY.dim, in_dim=TINY.channels, ffn_dim=TINY.ffn, out_dim=16, text_dim=TINY.text, freq_dim=TINY.freq,
        eps=1e-6, patch_size=(1, 2, 2), num_heads=1, num_layers=TINY.layers, has_image_input=False,
    )  # fmt: skip
    return model.eval()


def denoise(module: Any, model: Any, dtype: torch.dtype) -> torch.Tensor:
    """What DiffSynth's pipeline does with the model: it calls its parts, never the model itself."""
    given = diffusers.inputs(dtype)
    with torch.no_grad():
        t = model.time_embedding(module.sinusoidal_embedding_1d(model.freq_dim, given["timestep"].to(dtype)))
        t_mod = model.time_projection(t).unflatten(1, (6, model.dim))
        context = model.text_embedding(given["encoder_hidden_states"])
        x = model.patchify(given["hidden_states"])
        f, h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()
        freqs = torch.cat(
            [
                model.freqs[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
                model.freqs[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
                model.freqs[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ],
            dim=-1,
        ).reshape(f * h * w, 1, -1)
        for block in model.blocks:
            x = block(x, context, t_mod, freqs)
        result: torch.Tensor = model.unpatchify(model.head(x, t), (f, h, w))
    return result


@pytest.mark.usefixtures("diffsynth")
def test_diffsynths_wan_model_is_patched_as_it_is_loaded() -> None:
    armed = install({"weights": "fp8"}, announce=lambda report: None)
    try:
        module: Any = importlib.import_module("diffsynth.models.wan_video_dit")
        model = dit(module)
        assert patched_state(model) is None
        model.load_state_dict(state(), assign=True)  # as its loader fills it
        model = model.to(dtype=torch.bfloat16, device="cpu")  # as its loader goes on
    finally:
        armed.undo()
    assert host_of(model).name == "wan_original"
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 20
    assert len(armed.reports) == 1
    plain = dit(module)
    plain.load_state_dict(state())
    assert patched_state(plain) is None
    truth = denoise(module, plain, torch.float32)
    # DiffSynth computes the timestep and the modulation in the caller's dtype, so bf16 rounds more than elsewhere.
    assert diffusers.error(denoise(module, model, torch.bfloat16), truth) < 0.06
    assert diffusers.error(truth, diffusers.run(diffusers.transformer())) < 2e-2
