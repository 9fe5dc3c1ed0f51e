"""A pipeline is put together from parts that fit each other, or not at all."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import files
from tests.builders.wan import Sizes, hollow
from wan_runtime.bases import RELEASES, tiny_base, tiny_checkpoint
from wan_runtime.errors import CheckpointError, InvalidOption, UnaccountedTensors
from wan_runtime.generating import clip_profile, generate
from wan_runtime.linear import QuantLinear
from wan_runtime.names import to_original
from wan_runtime.names._variants import KNOWN
from wan_runtime.pipelines import load_pipeline
from wan_runtime.vaes import names_of


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


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second expert: the tiny model with another modulation."""
    weights = load_file(tiny_checkpoint())
    weights["scale_shift_table"] = weights["scale_shift_table"] * 1.1
    path = tmp_path_factory.mktemp("low") / "wan_low_noise.safetensors"
    save_file(weights, path)
    return path


def test_two_checkpoints_are_two_experts(low: Path) -> None:
    pipe = load_pipeline(tiny_checkpoint(), checkpoint_low=low, device="cpu")
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


SIZES_14B = Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            Sizes(dim=1536, ffn=8960, layers=30, text=4096, freq=256),
            r"T2V-1\.3B\. .*Wan2\.1-T2V-1\.3B-Diffusers\.",
        ),
        (SIZES_14B, r"T2V-14B .*Wan2\.1-T2V-14B-Diffusers .*Wan2\.2-T2V-A14B-Diffusers"),
        (
            Sizes(dim=3072, ffn=14336, layers=30, text=4096, freq=256, channels=48),
            r"TI2V-5B\. .*--base Wan-AI/Wan2\.2-TI2V-5B-Diffusers\.",
        ),
        (replace(SIZES_14B, channels=36, image=1280), r"I2V-14B-480P-Diffusers .*I2V-14B-720P-Diffusers"),
        (replace(SIZES_14B, channels=36), r"--base Wan-AI/Wan2\.2-I2V-A14B-Diffusers\."),
        (replace(SIZES_14B, layers=3), r"--base; no release of these sizes is known\."),
    ],
)
def test_a_model_without_a_base_is_told_its_own_release(tmp_path: Path, sizes: Sizes, said: str) -> None:
    with pytest.raises(InvalidOption, match=f"holds the transformer alone, of .*{said}"):
        load_pipeline(hollow(tmp_path / "big.safetensors", sizes), device="cpu")


def test_every_release_is_of_a_variant_that_files_are_told_by() -> None:
    assert RELEASES.keys() <= {name.partition(" ")[0] for name in KNOWN.values()}


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"gone\.safetensors"):
        load_pipeline(tmp_path / "gone.safetensors", device="cpu")


def test_a_base_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="not a diffusers directory"):
        load_pipeline(base=tmp_path, device="cpu")


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json", _class_name="WanVACEPipeline")
    with pytest.raises(InvalidOption, match="WanVACEPipeline"):
        load_pipeline(base=base, device="cpu")


def test_a_base_of_two_experts_needs_both_files(low: Path, tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json", boundary_ratio=0.9)
    with pytest.raises(InvalidOption, match="--checkpoint-low"):
        load_pipeline(base=base, device="cpu")
    pipe = load_pipeline(checkpoint_low=low, base=base, device="cpu")
    assert pipe.config.boundary_ratio == 0.9


def test_a_base_without_a_part_is_named(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json")
    shutil.rmtree(base / "vae")
    with pytest.raises(InvalidOption, match=r"lacks 1 of the parts .*: vae \(there is no such folder"):
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


def text_file(folder: Path, prefix: str = "") -> Path:
    """The tiny text encoder in one FP8 file, as ComfyUI's: transformers' names, and the tokenizer in a tensor."""
    state = load_file(tiny_base() / "text_encoder" / "model.safetensors")
    state = {k: t.float() for k, t in state.items() if k != "encoder.embed_tokens.weight"}
    linear = re.compile(r".*(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight")
    content = files.comfy_scaled_fp8(
        state, [k.removesuffix(".weight") for k in state if linear.fullmatch(k)], "fp8"
    )
    spiece = (tiny_base() / "tokenizer" / "spiece.model").read_bytes()
    content.tensors["spiece_model"] = torch.tensor(list(spiece), dtype=torch.uint8)
    return content.write(folder, "umt5_fp8_e4m3fn_scaled.safetensors")


def vae_file(folder: Path) -> Path:
    """The tiny VAE in one file, under the original release's names."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(tiny_base() / "vae")
    names = names_of(vae.config)
    path = folder / "wan_2.1_vae.safetensors"
    save_file({to_original(names, k): t.contiguous() for k, t in vae.state_dict().items()}, path)
    return path


def test_single_files_take_the_place_of_the_bases_parts(tmp_path: Path) -> None:
    text, vae = text_file(tmp_path), vae_file(tmp_path)
    pipe = load_pipeline(text_encoder=text, vae=vae, device="cpu")
    whole = load_pipeline(device="cpu")
    held = [m for m in pipe.text_encoder.modules() if isinstance(m, QuantLinear)]
    assert len(held) == 7 * len(pipe.text_encoder.encoder.block) and {m.format for m in held} == {"fp8"}
    assert all(torch.equal(t, whole.vae.state_dict()[name]) for name, t in pipe.vae.state_dict().items())
    assert pipe.vae.config.latents_mean == whole.vae.config.latents_mean
    request = clip_profile(pipe).request(
        "a red circle", width=64, height=64, num_frames=5, num_inference_steps=2, seed=0, guidance_scale=1.0
    )
    clips = [torch.from_numpy(generate(p, request).frames).float() for p in (pipe, whole)]
    assert clips[0].shape == clips[1].shape
    assert (clips[0] - clips[1]).norm() / clips[
        1
    ].norm() < 0.1  # the same clip but for FP8 in the text encoder


def test_the_tokenizer_in_the_text_encoders_file_serves_a_base_without_one(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "model_index.json")
    for folder in ("tokenizer", "text_encoder"):
        shutil.rmtree(base / folder)
    pipe = load_pipeline(base=base, text_encoder=text_file(tmp_path), device="cpu")
    whole = load_pipeline(device="cpu")
    prompt = "a blue square moves right"
    assert pipe.tokenizer(prompt).input_ids == whole.tokenizer(prompt).input_ids


def test_a_base_without_a_vae_does_for_a_file_of_known_sizes_alone(tmp_path: Path) -> None:
    """The tiny VAE's file does not hold the mean and spread of its latents: without the base nobody knows them."""
    base = base_with(tmp_path / "base", "model_index.json")
    shutil.rmtree(base / "vae")
    with pytest.raises(UnaccountedTensors, match="of no size that is known"):
        load_pipeline(base=base, vae=vae_file(tmp_path), device="cpu")
