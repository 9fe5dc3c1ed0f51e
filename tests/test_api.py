"""patch, load and unpatch as a user calls them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wan_runtime
from tests.builders import files
from tests.builders.wan import block_linears, state
from tests.hosts.diffusers import checkpoint, error, latents, pipeline, run, transformer
from wan_runtime.errors import (
    BackendUnavailable,
    HostNotRecognised,
    InvalidOption,
)
from wan_runtime.linear import QuantLinear

SPELLING = {"comfy_scaled_fp8": "fp8", "comfy": "nvfp4", "modelopt": "nvfp4"}


def dequantised(content: files.Content) -> Any:
    """The oracle: a plain fp32 model with the weights that the builder says the file means."""
    model = transformer()
    names = dict(zip(block_linears(), block_linears(spelling="diffusers"), strict=True))
    with torch.no_grad():
        for original, weight in content.weights.items():
            model.get_submodule(names[original]).weight.copy_(torch.from_numpy(weight))
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("plain") / "model.safetensors")


def quantised(folder: Path, dialect: str = "comfy_scaled_fp8") -> tuple[files.Content, Path]:
    content: files.Content = getattr(files, dialect)(state(), block_linears(), SPELLING[dialect])
    return content, content.write(folder)


def test_signatures_are_the_contract() -> None:
    patch = inspect.signature(wan_runtime.patch).parameters
    defaults = {name: p.default for name, p in patch.items() if p.kind is p.KEYWORD_ONLY}
    assert defaults == {
        "weights": "auto", "compute": "auto", "backend": "auto", "attention": "auto", "fuse": True, "skip": (),
        "dialect": None, "reference": None, "activation": "dynamic",
        "attention_end_blocks": None, "attention_end_steps": None,
    }  # fmt: skip
    assert list(patch)[:2] == ["model", "checkpoint"] and patch["checkpoint"].default is None
    load = inspect.signature(wan_runtime.load).parameters
    assert (load["host"].default, load["device"].default) == ("diffusers", None)


@pytest.mark.parametrize("dialect", SPELLING)
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_a_quantised_file_gives_what_its_weights_mean(dialect: str, compute: str, tmp_path: Path) -> None:
    content, path = quantised(tmp_path, dialect)
    truth = run(dequantised(content))
    model = transformer(seed=6)
    report = wan_runtime.patch(model, path, compute=compute)
    assert len(report.quantised) == 20 and report.dialect == dialect
    assert model.dtype == torch.bfloat16
    model.to(torch.float32)
    assert error(run(model), truth) < 1e-5
    loaded = wan_runtime.load(path, compute=compute, device="cpu", dtype=torch.float32)
    assert error(run(loaded), truth) < 1e-5
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_load_computes_in_bf16_unless_told(tmp_path: Path) -> None:
    content, path = quantised(tmp_path)
    model = wan_runtime.load(path, device="cpu")
    assert model.dtype == torch.bfloat16
    assert error(run(model, torch.bfloat16), run(dequantised(content))) < 0.03


def test_load_onto_meta_free_model_leaves_nothing_on_meta(plain: Path) -> None:
    model = wan_runtime.load(plain, device="cpu")
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_load_onto_meta_checks_the_file_and_keeps_no_values(plain: Path) -> None:
    model = wan_runtime.load(plain, device="meta", weights="fp8")
    assert all(p.is_meta for p in model.parameters())
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_patching_a_model_on_meta(plain: Path) -> None:
    model = transformer_on_meta()
    wan_runtime.patch(model, plain, weights="nvfp4")
    assert not any(p.is_meta for p in model.parameters())
    assert run(model, torch.bfloat16).isfinite().all()
    model = transformer_on_meta()
    with pytest.raises(InvalidOption, match="meta device"):
        wan_runtime.patch(model)


def transformer_on_meta() -> Any:
    from accelerate import init_empty_weights

    cls, config = type(transformer()), transformer().config
    with init_empty_weights(include_buffers=False):
        return cls.from_config(config)


def test_patching_twice_is_a_no_op_that_says_so(plain: Path) -> None:
    model = transformer()
    first = wan_runtime.patch(model)
    modules = list(model.modules())
    again = wan_runtime.patch(model)
    assert not first.already and again.already and "nothing was done" in str(again)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    with pytest.raises(InvalidOption, match="unpatch"):
        wan_runtime.patch(model, plain)


def test_the_same_file_twice_is_a_no_op(plain: Path) -> None:
    model = transformer()
    wan_runtime.patch(model, plain, weights="fp8")
    assert wan_runtime.patch(model, plain).already
    assert wan_runtime.patch(model, str(plain)).already
    assert wan_runtime.patch(model, plain.parent).already, "the folder that holds it is the same file"
    with pytest.raises(InvalidOption, match="patched already"):
        wan_runtime.patch(model, plain.with_name("other.safetensors"))


@pytest.mark.parametrize("found", ["pipeline", "linear", "string"])
def test_what_is_no_wan_transformer_is_refused(found: str) -> None:
    target: Any = {"pipeline": pipeline(transformer()), "linear": nn.Linear(2, 2), "string": "model"}[found]
    with pytest.raises(
        HostNotRecognised, match=r"Pass the transformer itself \(pipe\.transformer\)"
    ) as caught:
        wan_runtime.patch(target)
    assert "wan_diffusers" in caught.value.known


def test_keep_without_a_file_makes_the_residents_fp32_and_no_more() -> None:
    model = transformer(torch.bfloat16)
    report = wan_runtime.patch(model, weights="keep")
    assert not report.quantised
    assert error(run(model, torch.bfloat16), run(transformer())) < 0.02


def test_explicit_choices_that_cannot_be_served() -> None:
    model = transformer()
    choices: list[tuple[dict[str, Any], str]] = [
        ({"backend": "te"}, "te"),
        ({"attention": "fa3"}, "needs a Hopper GPU"),
        ({"backend": "reference", "compute": "bf16"}, "it computes in fp32 only"),
    ]
    for options, said in choices:
        with pytest.raises(BackendUnavailable, match=said) as caught:
            wan_runtime.patch(model, **options)
        assert caught.value.refusals and "Use 'auto'" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fp8 products are served")
def test_fp8_products_on_the_cpu_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match="need a CUDA GPU"):
        wan_runtime.patch(transformer(), compute="fp8")


def test_a_wan_pipeline_runs_a_patched_model(tmp_path: Path) -> None:
    truth = latents(pipeline(transformer()))
    for dtype in (torch.float32, torch.bfloat16):
        model = transformer(dtype)
        wan_runtime.patch(model)
        pipe = pipeline(model)
        assert pipe.transformer.dtype == torch.bfloat16
        assert error(latents(pipe), truth) < 0.03
    pipe.to(torch.float16)
    assert pipe.transformer.dtype == torch.float16
    assert error(latents(pipe), truth) < 0.03
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32, torch.uint8}


def test_load_builds_for_known_hosts_only(plain: Path) -> None:
    with pytest.raises(
        InvalidOption,
        match="host='comfy': a model can be built from a file for diffusers_animate_2, diffusers only",
    ):
        wan_runtime.load(plain, host="comfy")


@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`"
)  # NVFP4's table of values
@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_a_patched_model_compiles_in_one_graph(weights: str) -> None:
    model = transformer()
    wan_runtime.patch(model, weights=weights)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(run(compiled, torch.bfloat16), run(model, torch.bfloat16))
