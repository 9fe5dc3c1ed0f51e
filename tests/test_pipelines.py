"""A pipeline is put together from parts that fit each other, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_runtime.errors import CheckpointError, InvalidOption
from wan_runtime.generating import clip_profile, generate
from wan_runtime.pipelines import load_pipeline, tiny_base, tiny_checkpoint


def base_with(folder: Path, part: str, **changes: object) -> Path:
    """A copy of the tiny base (weights linked) in which one JSON file says something else."""
    shutil.copytree(tiny_base(), folder, ignore=shutil.ignore_patterns("*.py", "train", "__pycache__"))
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_the_bundled_model_is_the_default_in_fp32_on_a_cpu() -> None:
    pipe = load_pipeline(device="cpu")
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert not pipe.transformer.training and not pipe.vae.training and not pipe.text_encoder.training
    assert (pipe.transformer_2, pipe.config.boundary_ratio) == (None, None)


def test_the_vae_stays_fp32_beside_a_bf16_transformer() -> None:
    pipe = load_pipeline(device="cpu", dtype=torch.bfloat16)
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert pipe.vae.dtype == torch.float32


def test_two_checkpoints_are_two_experts() -> None:
    pipe = load_pipeline(tiny_checkpoint(), checkpoint_low=tiny_checkpoint(), device="cpu")
    assert pipe.config.boundary_ratio == 0.875
    assert pipe.transformer_2 is not None and pipe.transformer_2 is not pipe.transformer
    used = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: used.append(name))
    request = clip_profile(pipe).request(
        "a circle", width=64, height=64, num_frames=5, num_inference_steps=4, seed=0, guidance_scale=1.0
    )
    generate(pipe, request)
    assert used[0] == "transformer" and used[-1] == "transformer_2" and len(used) == 4


def test_a_model_that_is_not_the_tiny_one_needs_a_base(tmp_path: Path) -> None:
    deeper = tmp_path / "deeper.safetensors"
    weights = load_file(tiny_checkpoint())
    last = {name.replace("blocks.5.", "blocks.6."): tensor.clone() for name, tensor in weights.items()}
    save_file({**weights, **last}, deeper)
    with pytest.raises(InvalidOption, match="--base"):
        load_pipeline(deeper, device="cpu")
    pipe = load_pipeline(deeper, base=tiny_base(), device="cpu")
    assert len(pipe.transformer.blocks) == 7


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"gone\.safetensors"):
        load_pipeline(tmp_path / "gone.safetensors", device="cpu")


def test_a_base_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="not a diffusers directory"):
        load_pipeline(base=tmp_path, device="cpu")


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json", _class_name="WanImageToVideoPipeline")
    with pytest.raises(InvalidOption, match="WanImageToVideoPipeline"):
        load_pipeline(base=base, device="cpu")


def test_a_base_of_two_experts_needs_both_files(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json", boundary_ratio=0.9)
    with pytest.raises(InvalidOption, match="--checkpoint-low"):
        load_pipeline(base=base, device="cpu")
    pipe = load_pipeline(checkpoint_low=tiny_checkpoint(), base=base, device="cpu")
    assert pipe.config.boundary_ratio == 0.9


def test_a_base_without_a_part_is_named(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json")
    shutil.rmtree(base / "vae")
    with pytest.raises(InvalidOption, match="No vae could be read"):
        load_pipeline(base=base, device="cpu")
    pipe = load_pipeline(base=base, vae=tiny_base() / "vae", device="cpu")
    assert pipe.vae.dtype == torch.float32


def test_a_text_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    wide = UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=96, d_kv=32, d_ff=64, num_layers=1, num_heads=3)
    )
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(InvalidOption, match="text width 128, base 96"):
        load_pipeline(text_encoder=tmp_path / "wide", device="cpu")


def test_single_files_of_other_parts_are_refused_plainly(tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    file.touch()
    with pytest.raises(InvalidOption, match="not read yet"):
        load_pipeline(device="cpu", text_encoder=file)
    with pytest.raises(InvalidOption, match="not read yet"):
        load_pipeline(device="cpu", vae=file)
