"""Whether a file, a model and the options fit each other, found out before anything changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.wan import Sizes, block_linears, state
from tests.hosts.diffusers import checkpoint, error, run, transformer
from wan_runtime.errors import InvalidOption, NothingToPatch, UnaccountedTensors
from wan_runtime.linear import QuantLinear
from wan_runtime.swap import patched_state


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("plain") / "model.safetensors")


def test_damaged_weights_are_refused() -> None:
    model = transformer()
    with torch.no_grad():
        model.get_submodule("blocks.1.attn1.to_k").weight[0, 0] = float("inf")
    with pytest.raises(InvalidOption, match=r"blocks\.1\.attn1\.to_k\.weight holds NaN or infinite"):
        wan_runtime.patch(model)
    assert patched_state(model) is None


def test_zero_layers_is_an_error() -> None:
    model = transformer()
    with pytest.raises(NothingToPatch, match=r"skipped by '\*'"):
        wan_runtime.patch(model, skip=("*",))
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_plain_file_loads_and_the_report_says_it_is_plain(plain: Path) -> None:
    model = transformer(seed=2)
    report = wan_runtime.patch(model, plain)
    assert not report.quantised and any("not quantised" in note for note in report.notes)
    assert not any("input scales" in note for note in report.notes), "it quantises no activations"
    said = wan_runtime.patch(transformer(), plain, weights="fp8").notes
    assert not any("not quantised" in note or "input scales" in note for note in said), "it was just done"
    model.to(torch.float32)
    assert error(run(model), run(transformer())) < 5e-3


def test_a_file_of_another_size_is_refused(plain: Path) -> None:
    with pytest.raises(UnaccountedTensors, match="slots of the model were not filled"):
        wan_runtime.patch(transformer(sizes=Sizes(layers=3)), plain)
    with pytest.raises(UnaccountedTensors, match="tensors of the file were not consumed"):
        wan_runtime.patch(transformer(sizes=Sizes(layers=1)), plain)


def with_input_scales(content: files.Content) -> files.Content:
    for module in block_linears():
        content.tensors[f"{module}.scale_input"] = torch.tensor([0.05])
    return content


def test_static_activation_needs_every_input_scale(tmp_path: Path) -> None:
    content = files.comfy_scaled_fp8(state(), block_linears(), "fp8")
    path = content.write(tmp_path / "none")
    with pytest.raises(InvalidOption, match=r"20 have none, the first 'blocks\.0\.attn1\.to_q'"):
        wan_runtime.patch(transformer(), path, activation="static")
    assert any(
        "no input scales, and needs none" in note for note in wan_runtime.patch(transformer(), path).notes
    )
    scaled = with_input_scales(content)
    path = scaled.write(tmp_path / "all")
    model = transformer()
    report = wan_runtime.patch(model, path, activation="static")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert all(m.static and m.slots["input_scale"].item() == pytest.approx(0.05) for m in layers)
    assert any("static" in note for note in report.notes), "on a CPU activations are not quantised at all"
    with pytest.raises(InvalidOption, match="20 have none"):  # an fp8 scale is no nvfp4 scale
        wan_runtime.patch(transformer(), path, activation="static", weights="nvfp4")
    del scaled.tensors["blocks.1.ffn.0.scale_input"]
    with pytest.raises(InvalidOption, match=r"1 have none, the first 'blocks\.1\.ffn\.net\.0\.proj'"):
        wan_runtime.patch(transformer(), scaled.write(tmp_path / "mixed"), activation="static")
    assert wan_runtime.patch(transformer(), tmp_path / "mixed").quantised, "dynamic needs none"
