"""fp8 tensors without a scale: noise beside scaled ones and in an unquantised file, and ordinary in a plain cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wan_runtime
from tests.reading import FIRST, SCALED, content, host, refused
from wan_runtime.checkpoint import open_checkpoint, read_plain
from wan_runtime.errors import BadTensor, CheckpointError

__all__ = ["host"]  # the fixture
F8 = torch.float8_e4m3fn


def scaled_codes(tensor: torch.Tensor) -> torch.Tensor:
    """What a quantiser stores for a tensor, without the scale it was divided by."""
    return (tensor.float() / (tensor.float().abs().max() / 448)).to(F8)


@pytest.mark.parametrize(("dialect", "weight_format"), SCALED)
@pytest.mark.parametrize("key", ["patch_embedding.weight", "blocks.0.modulation"])
def test_codes_without_a_scale_are_not_values_beside_scaled_layers(
    host: torch.nn.Module, tmp_path: Path, dialect: str, weight_format: str, key: str
) -> None:
    wanted = content(dialect, weight_format)
    wanted.tensors[key] = scaled_codes(wanted.tensors[key])
    error = refused(host, wanted.write(tmp_path), BadTensor, "no scale")
    assert isinstance(error, BadTensor) and error.key == key


def test_a_scaled_file_that_lost_its_scales_is_not_an_unquantised_one(
    host: torch.nn.Module, tmp_path: Path
) -> None:
    wanted = content("comfy_scaled_fp8", "fp8")
    for key in [key for key in wanted.tensors if "scale" in key]:
        del wanted.tensors[key]
    path = wanted.write(tmp_path)
    for named in (None, "plain", "plain_fp8"):
        with pytest.raises(CheckpointError, match="scale"):
            wan_runtime.patch(host, path, dialect=named)


def test_a_bias_cast_to_fp8_is_read_and_one_that_lost_its_scale_is_refused(
    host: torch.nn.Module, tmp_path: Path
) -> None:
    wanted = content("comfy_scaled_fp8", "fp8")
    key = f"{FIRST}.bias"
    truth = wanted.tensors[key].to(F8)
    wanted.tensors[key] = truth
    assert read_plain(open_checkpoint(wanted.write(tmp_path)), key).equal(truth.float())
    wanted.tensors[key] = scaled_codes(wanted.tensors[key])
    error = refused(host, wanted.write(tmp_path), BadTensor, "lost their scales")
    assert isinstance(error, BadTensor) and error.key == key


def test_the_nearest_key_is_one_of_the_layers_own(host: torch.nn.Module, tmp_path: Path) -> None:
    wanted = content("comfy_scaled_fp8", "fp8")
    wanted.tensors[f"{FIRST}.scale_wt"] = wanted.tensors.pop(f"{FIRST}.scale_weight")
    refused(host, wanted.write(tmp_path), BadTensor, f"{FIRST}.scale_wt")
