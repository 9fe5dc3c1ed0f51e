"""Folders: a diffusers model or pipeline, one with nothing to load, and what the operating system refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wan_runtime
from tests.builders.wan import state
from wan_runtime.containers import CONTAINERS, locate, read_header
from wan_runtime.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for word in words:
        assert word in str(caught.value)


def pipeline(folder: Path, *experts: str) -> Path:
    """A diffusers pipeline's folder, with transformers alone; the experts differ in every value."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for number, name in enumerate(experts, 1):
        (folder / name).mkdir()
        save_file({k: t * number for k, t in state(spelling="diffusers").items()}, folder / name / WEIGHTS)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    return folder


def test_a_model_s_folder_is_its_file_with_its_config(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "transformer") / "transformer"
    for path in (folder, tmp_path, folder / WEIGHTS):
        header = read_header(path)
        assert header.path == folder / WEIGHTS and header.container == "safetensors"
        assert header.config == {"_class_name": "WanTransformer3DModel"} and header.notes == ()


def test_of_two_experts_the_first_is_read_and_the_other_named(tmp_path: Path) -> None:
    pipeline(tmp_path, "transformer", "transformer_2")
    whole = read_header(tmp_path)
    assert whole.path == tmp_path / "transformer" / WEIGHTS
    assert whole.notes == (
        f"transformer/ was chosen: the high-noise expert of two; the low-noise one is {tmp_path / 'transformer_2'}",
    )
    second = read_header(tmp_path / "transformer_2")
    assert second.path == tmp_path / "transformer_2" / WEIGHTS
    assert second.notes == (
        f"transformer_2/ is the low-noise expert of two; the high-noise one is {tmp_path / 'transformer'}",
    )
    key = "blocks.0.ffn.net.2.weight"
    assert second.read_tensor(key).equal(2 * whole.read_tensor(key))


def test_commands_say_which_expert_they_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(tmp_path / "pipe", "transformer", "transformer_2")
    for name, said in (
        ("", "transformer/ was chosen"),
        ("transformer_2", "transformer_2/ is the low-noise expert"),
    ):
        path = tmp_path / "pipe" / name
        assert said in wan_runtime.inspect(path).odd[0]
        model = wan_runtime.load(path, device="cpu", weights="keep")
        report = wan_runtime.patch(model, path)
        assert report.already and said in report.notes[0]
        converted = wan_runtime.convert(path, tmp_path / "new.safetensors", "bf16")
        assert said in converted.notes[0]


def test_a_second_load_of_one_checkpoint_by_another_name_is_the_same(tmp_path: Path) -> None:
    pipeline(tmp_path, "transformer", "transformer_2")
    model = wan_runtime.load(tmp_path, device="cpu", weights="keep")
    for name in ("", "transformer", f"transformer/{WEIGHTS}"):
        assert wan_runtime.patch(model, tmp_path / name).already
    with pytest.raises(wan_runtime.errors.InvalidOption, match="patched already"):
        wan_runtime.patch(model, tmp_path / "transformer_2")


def test_a_pipeline_without_a_transformer_says_so(tmp_path: Path) -> None:
    pipeline(tmp_path, "transformer_2")
    refused(tmp_path, "no folder transformer/")
    (tmp_path / "transformer").mkdir()
    refused(tmp_path, "transformer: the folder holds no checkpoint. It has nothing at all")


def test_the_original_release_s_two_experts_are_named(tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / WEIGHTS)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"PK")
    refused(tmp_path, "its folders high_noise_model, low_noise_model do. Name one of them")


def test_an_empty_folder_says_what_is_there(tmp_path: Path) -> None:
    refused(tmp_path, "holds no checkpoint", "nothing at all")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "It has notes.txt")
    (tmp_path / "model.pth").touch()
    refused(tmp_path, "no .safetensors file", "model.pth", "convert")


def test_text_encoder_and_vae_pickles_beside_a_file_do_not_matter(tmp_path: Path) -> None:
    """The original release: one folder with the transformer, and T5 and VAE as .pth."""
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    torch.save({"a": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    assert read_header(tmp_path).path == tmp_path / WEIGHTS


def test_two_unrelated_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("high.safetensors", "low.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    refused(tmp_path, "holds 2 checkpoints", "high.safetensors (one file), low.safetensors (one file)")


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "real", "transformer")
    (tmp_path / "pipe").symlink_to(folder)
    (tmp_path / "one.safetensors").symlink_to(folder / "transformer" / WEIGHTS)
    for name in ("pipe", "one.safetensors"):
        assert read_header(tmp_path / name).entries.keys() == state(spelling="diffusers").keys()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path / "dangling.safetensors", "it is a link to", "gone")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no such file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "neither a file nor a folder")


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").symlink_to(
        "/proc/self/mem"
    )  # a file whose first bytes even root cannot read
    refused(tmp_path / "m.safetensors", "it cannot be read", "Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").chmod(0)
    refused(tmp_path / "m.safetensors", "it cannot be read", "Permission denied")


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_container_finds_anything_in_an_empty_folder(tmp_path: Path, name: str) -> None:
    assert list(CONTAINERS[name].find(tmp_path)) == []


def test_a_checkpoint_is_found_again_under_the_name_it_was_given(tmp_path: Path) -> None:
    pipeline(tmp_path, "transformer")
    found, _ = locate(tmp_path)
    assert locate(found.path)[0] == found
