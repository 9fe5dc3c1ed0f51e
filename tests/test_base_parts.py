"""What a base must hold depends on what is given beside it; what it lacks is named before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from tests.builders import image_to_video
from wan_runtime.base_parts import check_base
from wan_runtime.bases import Base, base_of, tiny_base, tiny_checkpoint
from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.errors import InvalidOption
from wan_runtime.parts import check_given

TRANSFORMER = open_checkpoint(tiny_checkpoint())


def check(
    folder: Path, *without: str, text_encoder: Path | None = None, vae: Path | None = None
) -> str | None:
    """What is said of a copy of the tiny base `without` some of its folders."""
    base = image_to_video.base(folder)
    for part in without:
        shutil.rmtree(base / part)
    try:
        check_base(base_of(TRANSFORMER, base), TRANSFORMER, text_encoder, vae)
    except InvalidOption as refused:
        return str(refused)
    return None


def test_everything_that_is_missing_is_named_with_what_there_is_and_what_to_do(tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert check(base, "vae", "scheduler") == (
        f"--base {base} lacks 2 of the parts that are taken from it: vae (there is no such folder); scheduler (there "
        "is no such folder). It holds README.md, model_index.json, sheet.png, text_encoder, tokenizer. Give a whole "
        "release of this model, downloaded again where this was one. In place of vae, --vae serves too."
    )


def test_a_part_that_is_given_is_not_missed(tmp_path: Path) -> None:
    assert check(tmp_path / "whole") is None
    assert check(tmp_path / "1", "vae", vae=tiny_base() / "vae") is None
    assert check(tmp_path / "2", "text_encoder", text_encoder=tiny_base() / "text_encoder") is None


def test_a_tokenizer_may_come_with_the_encoder(tmp_path: Path) -> None:
    file, bare = tmp_path / "umt5.safetensors", tmp_path / "bare.safetensors"
    tensors = load_file(tiny_base() / "text_encoder" / "model.safetensors")
    save_file(tensors, bare)
    spiece = (tiny_base() / "tokenizer" / "spiece.model").read_bytes()
    save_file({**tensors, "spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, file)
    assert check(tmp_path / "1", "text_encoder", "tokenizer", text_encoder=file) is None
    said = check(tmp_path / "2", "text_encoder", "tokenizer", text_encoder=bare)
    assert said is not None and "tokenizer (there is" in said and "text_encoder (" not in said


def test_a_missing_shard_is_missed(tmp_path: Path) -> None:
    base = image_to_video.base(tmp_path / "base")
    folder = base / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    where = {name: file for file, held in halves.items() for name in held}
    where["lm_head.weight"] = next(
        iter(halves)
    )  # tied to another tensor and so not saved: transformers does not miss it
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    check_base(base_of(TRANSFORMER, base), TRANSFORMER, None, None)
    UMT5EncoderModel.from_pretrained(folder)
    (folder / next(iter(halves))).unlink()
    with pytest.raises(OSError, match="model-00001"):
        UMT5EncoderModel.from_pretrained(folder)
    with pytest.raises(InvalidOption, match=r"text_encoder \(.*model-00001-of-00002\.safetensors"):
        check_base(base_of(TRANSFORMER, base), TRANSFORMER, None, None)


def test_the_release_of_the_model_is_named(tmp_path: Path) -> None:
    """A Wan2.1 I2V model takes its image encoder from the base too."""
    from tests.builders.wan import Sizes, hollow

    big = Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256, channels=36, image=1280)
    transformer = open_checkpoint(hollow(tmp_path / "big.safetensors", big))
    base = Base(str(image_to_video.base(tmp_path / "base")), {})
    with pytest.raises(InvalidOption) as refused:
        check_base(base, transformer, None, None)
    assert "image_encoder (there is no such folder); image_processor (" in str(refused.value)
    assert "(--base Wan-AI/Wan2.1-I2V-14B-480P-Diffusers (480P) or " in str(refused.value)


def test_a_folder_given_for_a_part_must_be_whole_too(tmp_path: Path) -> None:
    vae = shutil.copytree(tiny_base() / "vae", tmp_path / "vae")
    check_given(tiny_checkpoint(), None, None, vae, {})
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        InvalidOption, match=r"--vae .* is not a whole VAE: it has no diffusion_pytorch_model"
    ):
        check_given(tiny_checkpoint(), None, None, vae, {})
