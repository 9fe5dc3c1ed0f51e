"""Files given as a part that they are not, or of another model, are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.builders.wan import Sizes, state
from wan_runtime.bases import tiny_base
from wan_runtime.errors import InvalidOption
from wan_runtime.parts import check_given


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformer") / "model.safetensors"
    save_file(state(Sizes(channels=16)), path)
    return path


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "part.safetensors")
    return folder / "part.safetensors"


TEXT = {"blocks.0.attn.q.weight": torch.zeros(2, 2)}
VAE = {"encoder.downsamples.0.residual.0.gamma": torch.zeros(2), "conv2.weight": torch.zeros(16, 16, 1, 1, 1)}
VAE_5B = {
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": torch.zeros(2),
    "conv2.weight": torch.zeros(48, 48, 1, 1, 1),
}


def test_parts_that_are_what_they_are_given_as_pass(transformer: Path, tmp_path: Path) -> None:
    check_given(transformer, None, None, save(tmp_path, VAE), {})
    check_given(transformer, None, save(tmp_path, TEXT), None, {})
    check_given(transformer, None, tiny_base() / "text_encoder", tiny_base() / "vae", {})


def test_a_transformer_is_neither(transformer: Path) -> None:
    with pytest.raises(
        InvalidOption, match=r"--text-encoder .* is not a text encoder; it is a WAN transformer"
    ):
        check_given(transformer, None, transformer, None, {})
    with pytest.raises(
        InvalidOption, match=r"--vae .* is not a VAE; it is a WAN transformer\. .*--checkpoint"
    ):
        check_given(transformer, None, None, transformer, {})


def test_a_text_encoder_and_a_vae_are_not_one_another(transformer: Path, tmp_path: Path) -> None:
    file = save(tmp_path, TEXT)
    with pytest.raises(InvalidOption, match=r"is not a VAE; it is a text encoder: UMT5.*--text-encoder"):
        check_given(transformer, None, None, file, {})
    file = save(tmp_path, VAE)
    with pytest.raises(InvalidOption, match=r"is not a text encoder; it is a VAE: the Wan2\.1 VAE.*--vae"):
        check_given(transformer, None, file, None, {})


def test_folders_are_told_by_their_configuration(transformer: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"is not a VAE: its config.json says .*UMT5EncoderModel"):
        check_given(transformer, None, None, tiny_base() / "text_encoder", {})
    with pytest.raises(
        InvalidOption, match=r"is not a text encoder: its config.json says WanTransformer3DModel"
    ):
        check_given(transformer, None, tiny_base() / "transformer", None, {})
    with pytest.raises(InvalidOption, match=r"has no config.json"):
        check_given(transformer, None, None, tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidOption, match="not valid JSON"):
        check_given(transformer, None, None, tmp_path, {})


def test_what_is_not_there_and_what_cannot_be_read_is_named(transformer: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="gone is not there"):
        check_given(transformer, None, tmp_path / "gone", None, {})
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(InvalidOption, match=r"--vae .*cannot be read"):
        check_given(transformer, None, None, tmp_path / "empty.safetensors", {})


def test_the_5b_vae_with_another_model_and_the_reverse(transformer: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidOption, match=r"48 latent channels and is the Wan2\.2 VAE .of TI2V-5B.*16: the Wan2\.1"
    ):
        check_given(transformer, None, None, save(tmp_path, VAE_5B), {})
    small = tmp_path / "5b.safetensors"
    tensors = state(Sizes(channels=48))
    tensors["head.head.weight"] = torch.zeros(192, 128)
    tensors["head.head.bias"] = torch.zeros(192)
    save_file(tensors, small)
    check_given(small, None, None, save(tmp_path, VAE_5B), {})
    with pytest.raises(
        InvalidOption, match=r"16 latent channels and is the Wan2\.1 VAE.*has 48: the Wan2\.2 VAE"
    ):
        check_given(small, None, None, save(tmp_path, VAE), {})
