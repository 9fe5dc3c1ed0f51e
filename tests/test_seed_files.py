"""The case this library began with: the FP8 file that worked loads right, the NVFP4 one is refused or right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

import wan_runtime
from tests.builders import seed, wan
from tests.builders.codes import Floats
from tests.builders.files import Content
from wan_runtime.errors import AmbiguousDialect, CheckpointError

LAYERS = wan.block_linears()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return wan.state()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]) -> Path:
    """The bf16 file that both were made from."""
    content = Content({key: tensor.bfloat16() for key, tensor in state.items()})
    return content.write(tmp_path_factory.mktemp("original"), "original-bf16.safetensors")


def loaded(path: Path, **options: Any) -> WanTransformer3DModel:
    model = wan_runtime.load(path, device="cpu", dtype=torch.float32, **options)
    assert isinstance(model, WanTransformer3DModel)
    return model


def weights(model: WanTransformer3DModel) -> Iterator[tuple[str, Floats]]:
    """Original module path -> the weight that the layer multiplies by, seen through its own forward in fp32."""
    for ours, theirs in zip(LAYERS, wan.block_linears(spelling="diffusers"), strict=True):
        layer = model.get_submodule(theirs)
        bias = layer.bias.double().numpy()
        product = layer(torch.eye(layer.in_features)).detach().double().numpy()
        yield ours, (product - bias).T


def assert_right(model: WanTransformer3DModel, content: Content) -> None:
    for module, weight in weights(model):
        wanted = content.weights[module]
        # What the addition and removal of the bias rounds, in fp32.
        assert np.abs(weight - wanted).max() < 1e-6, module
    for original, diffusers, _ in wan.rows():
        if original.removesuffix(".weight") not in LAYERS:
            held = model.get_parameter(diffusers)
            assert held.dtype == torch.float32
            assert torch.equal(held, content.tensors[original].float()), original


@pytest.mark.parametrize("scalar", [False, True], ids=["scale of shape [1]", "scale of shape []"])
def test_the_working_fp8_file_loads_without_marker_or_option(
    tmp_path: Path, state: dict[str, torch.Tensor], scalar: bool
) -> None:
    content = seed.working_fp8(state, LAYERS, scalar=scalar)
    codes = content.tensors["blocks.0.cross_attn.k.weight"].float()
    assert codes.abs().max() == 1
    path = content.write(tmp_path)
    assert wan_runtime.inspect(path).dialect == "comfy_scaled_fp8"
    assert_right(loaded(path), content)


def test_the_nvfp4_file_is_refused_with_both_readings_and_the_remedies(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    path = seed.broken_nvfp4(state, LAYERS).write(tmp_path)
    for attempt in (wan_runtime.inspect, loaded):
        with pytest.raises(AmbiguousDialect) as refused:
            attempt(path)
        assert set(refused.value.candidates) == {"comfy", "modelopt"}
        message = str(refused.value)
        for said in (
            path.name,
            "--dialect comfy",
            "--dialect modelopt",
            "--reference",
            "high nibble",
            "low nibble",
        ):
            assert said in message


@pytest.mark.parametrize("comfy", [False, True], ids=["as modelopt lays it out", "as comfy lays it out"])
def test_the_nvfp4_file_loads_right_once_named(
    tmp_path: Path, state: dict[str, torch.Tensor], comfy: bool
) -> None:
    content = seed.broken_nvfp4(state, LAYERS, comfy=comfy)
    path = content.write(tmp_path)
    assert_right(loaded(path, dialect="comfy" if comfy else "modelopt"), content)


@pytest.mark.parametrize("comfy", [False, True], ids=["as modelopt lays it out", "as comfy lays it out"])
def test_the_bf16_original_settles_which_reading_is_right(
    tmp_path: Path, state: dict[str, torch.Tensor], original: Path, comfy: bool
) -> None:
    content = seed.broken_nvfp4(state, LAYERS, comfy=comfy)
    path = content.write(tmp_path)
    assert_right(loaded(path, reference=original), content)


def test_another_models_bf16_file_settles_nothing(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = seed.broken_nvfp4(state, LAYERS).write(tmp_path)
    stranger = Content(wan.state(seed=1)).write(tmp_path, "stranger.safetensors")
    with pytest.raises(CheckpointError, match=r"no reading is close to .*stranger"):
        loaded(path, reference=stranger)


def test_the_wrong_reading_is_noise_of_the_right_size(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """Why it is refused: read the other way, every figure but the weights looks right. Who insists is told."""
    path = (content := seed.broken_nvfp4(state, LAYERS)).write(tmp_path)
    with pytest.warns(RuntimeWarning, match="as was asked, and its weights contradict that: the layout test"):
        model = loaded(path, dialect="comfy")
    wrong = dict(weights(model))
    assert "contradict" in wan_runtime.patch(model).notes[0]  # the report that the first patch left
    for dialect in ("comfy", "modelopt"):
        told = any("contradict" in note for note in wan_runtime.inspect(path, dialect=dialect).odd)
        assert told == (dialect == "comfy")
    for module, right in content.weights.items():
        assert np.linalg.norm(wrong[module] - right) / np.linalg.norm(right) > 1
        assert wrong[module].std() == pytest.approx(right.std(), rel=0.2)


def test_the_nvfp4_file_converts_to_one_that_needs_no_naming(
    tmp_path: Path, state: dict[str, torch.Tensor], original: Path
) -> None:
    content = seed.broken_nvfp4(state, LAYERS)
    fixed = tmp_path / "fixed.safetensors"
    wan_runtime.convert(content.write(tmp_path / "in"), fixed, "comfy-nvfp4", reference=original)
    assert_right(loaded(fixed), content)
