"""The two experts of Wan2.2: one given twice, two of different models, and names that contradict the caller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders import files
from tests.builders.wan import Sizes, block_linears, state
from tests.hosts.diffusers import transformer
from wan_runtime import inspect, patch
from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.errors import InvalidOption
from wan_runtime.experts import refuse_twins
from wan_runtime.names import noise_in


def opened(folder: Path, name: str, seed: int = 0, sizes: Sizes | None = None) -> Checkpoint:
    return open_checkpoint(files.plain(state(sizes or Sizes(), seed=seed), [], "none").write(folder, name))


def test_two_experts_pass(tmp_path: Path) -> None:
    refuse_twins(opened(tmp_path, "a.safetensors", 1), opened(tmp_path, "b.safetensors", 2))


def test_one_file_twice_is_refused_by_any_path(tmp_path: Path) -> None:
    one = opened(tmp_path, "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(one.path)
    (tmp_path / "hard.safetensors").hardlink_to(one.path)
    for other in ("a", "link", "hard"):
        with pytest.raises(InvalidOption, match="both experts are the same file"):
            refuse_twins(one, open_checkpoint(tmp_path / f"{other}.safetensors"))


@pytest.mark.parametrize("weight_format", ["fp8", "nvfp4"])
def test_one_expert_in_two_formats_is_refused(weight_format: str, tmp_path: Path) -> None:
    """Its weights differ, and its biases as convert_to_quant corrects them; norms and modulation are equal."""
    one = opened(tmp_path, "a.safetensors")
    tensors = {k: t.bfloat16().float() if k.endswith("modulation") else t for k, t in state().items()}
    tensors = {k: t + 0.01 if k.endswith("ffn.0.bias") else t for k, t in tensors.items()}
    content = files.comfy(tensors, block_linears(), weight_format)
    other = open_checkpoint(content.write(tmp_path, "b.safetensors"))
    with pytest.raises(
        InvalidOption, match=r"are one expert: .* more of the tensors that no producer quantises"
    ):
        refuse_twins(one, other)


def test_one_tensor_that_differs_is_enough_for_two(tmp_path: Path) -> None:
    tensors = {**state(), "head.modulation": torch.ones(1, 2, 128)}
    other = open_checkpoint(files.plain(tensors, [], "none").write(tmp_path, "b.safetensors"))
    refuse_twins(opened(tmp_path, "a.safetensors"), other)


def test_experts_of_different_models_are_refused(tmp_path: Path) -> None:
    deep = opened(tmp_path, "b.safetensors", 2, Sizes(layers=3))
    with pytest.raises(InvalidOption, match=r"different models: .*2 layers.*3 layers"):
        refuse_twins(opened(tmp_path, "a.safetensors", 1), deep)


@pytest.mark.parametrize("names", [("low_noise", "high_noise"), ("low_noise", "b"), ("a", "high_noise")])
def test_exchanged_names_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    high, low = (opened(tmp_path, f"wan2.2_{name}_14B.safetensors", n) for n, name in enumerate(names))
    with pytest.raises(InvalidOption, match=r"is given as the (high|low)-noise expert, and its name says"):
        refuse_twins(high, low)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("Wan2_2-T2V-A14B-LOWnoise.safetensors", "low"),
        ("low_noise_model/diffusion_pytorch_model.safetensors", "low"),
        ("high_noise_model/low-noise.safetensors", "low"),
        ("high_noise_and_low_noise.safetensors", None),
        ("transformer_2/diffusion_pytorch_model.safetensors", "low"),
        ("transformer/diffusion_pytorch_model.safetensors", None),
        ("wan2.1_t2v_14B.safetensors", None),
    ],
)
def test_names_are_evidence(path: str, says: str | None, tmp_path: Path) -> None:
    assert noise_in(tmp_path / path) == says


def test_diffusers_first_transformer_is_the_high_noise_one_where_there_is_a_second(tmp_path: Path) -> None:
    (tmp_path / "transformer_2").mkdir()
    assert noise_in(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors") == "high"


def test_what_a_name_says_is_reported_as_no_more_than_that(tmp_path: Path) -> None:
    path = opened(tmp_path, "wan2.2_low_noise_14B.safetensors").path
    assert any("low-noise expert of two; nothing in the file says so" in note for note in inspect(path).odd)
    report = patch(transformer(), path)
    assert any("the low-noise expert of a two-expert model" in note for note in report.notes)
    other = opened(tmp_path, "wan2.1_14B.safetensors").path
    assert not any("noise" in note for note in (*inspect(other).odd, *patch(transformer(), other).notes))
