"""Small image-to-video models in diffusers' own classes: a transformer's file, and the base that goes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from wan_runtime.bases import tiny_base, tiny_checkpoint

IMAGE_WIDTH = 64
SMALL: dict[str, Any] = {
    "num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 128, "freq_dim": 32, "ffn_dim": 256,
    "num_layers": 2,
}  # fmt: skip


def base(folder: Path, **changes: object) -> Path:
    """A copy of the tiny base whose model_index.json says something else."""
    shutil.copytree(
        tiny_base(), folder, ignore=shutil.ignore_patterns("*.py", "train", "__pycache__", "transformer")
    )
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def wan22(folder: Path, scale: float = 1.0) -> Path:
    """A 36-channel transformer as Wan2.2's I2V experts are: the trained tiny one, that also takes in mask and image."""
    weights = load_file(tiny_checkpoint())
    trained = weights["patch_embedding.weight"]
    torch.manual_seed(0)
    beside = torch.randn(trained.shape[0], 20, *trained.shape[2:]) * trained.float().std()
    weights["patch_embedding.weight"] = torch.cat([trained, beside.to(trained)], 1).contiguous()
    weights["scale_shift_table"] = weights["scale_shift_table"] * scale
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wan_i2v.safetensors"
    save_file(weights, path)
    return path


def wan21(folder: Path) -> tuple[Path, Path]:
    """A transformer that attends to CLIP's tokens as Wan2.1's I2V does, and a base with such a CLIP."""
    torch.manual_seed(1)
    model = WanTransformer3DModel(
        **SMALL, in_channels=36, out_channels=16, image_dim=IMAGE_WIDTH, added_kv_proj_dim=128
    )
    where = base(folder / "base", _class_name="WanImageToVideoPipeline")
    clip = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=16,
    )  # fmt: skip
    CLIPVisionModel(clip).save_pretrained(where / "image_encoder")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(where / "image_processor")
    return _saved(model, folder), where


def ti2v(folder: Path) -> tuple[Path, Path]:
    """A transformer and a VAE of 48 channels, with a timestep a token and patches of 32 pixels, as TI2V-5B has them."""
    torch.manual_seed(2)
    model = WanTransformer3DModel(**SMALL, in_channels=48, out_channels=48)
    where = base(folder / "base", expand_timesteps=True)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, num_res_blocks=1, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip
    shutil.rmtree(where / "vae")
    vae.save_pretrained(where / "vae")
    return _saved(model, folder), where


def _saved(model: WanTransformer3DModel, folder: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "proj_out.weight":  # diffusers starts it at zero, which would draw nothing
                parameter.normal_(std=0.05)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path
