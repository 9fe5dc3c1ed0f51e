"""A small WanTransformer3DModel with trained-looking weights, a WanPipeline around it, and inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn

from tests.builders.wan import TINY, Sizes, state


def transformer(
    dtype: torch.dtype = torch.float32, seed: int = 0, sizes: Sizes = TINY
) -> WanTransformer3DModel:
    """The model, in eval mode, every tensor in `dtype`."""
    model = WanTransformer3DModel(
        num_attention_heads=sizes.dim // 128,
        attention_head_dim=128,
        in_channels=sizes.channels,
        out_channels=16,
        text_dim=sizes.text,
        freq_dim=sizes.freq,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
        image_dim=sizes.image,
        added_kv_proj_dim=sizes.dim if sizes.image else None,
    )
    model.load_state_dict(state(sizes, spelling="diffusers", seed=seed))
    for parameter in model.parameters():  # .to(dtype) would warn
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1, batch: int = 1) -> dict[str, Any]:
    """Arguments of one forward: latents [batch, 16, 3, 8, 8], 16 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 16, 3, 8, 8, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 16, TINY.text, generator=generator).to(dtype),
        "return_dict": False,
    }


def run(model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        result: torch.Tensor = model(**inputs(dtype, **options))[0]
    return result


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def checkpoint(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A plain file under diffusers names."""
    save_file({k: v.to(dtype) for k, v in state(spelling="diffusers", seed=seed).items()}, path)
    return path


def pipeline(model: nn.Module) -> Any:
    """diffusers' own pipeline around a model, from prompt embeddings to latents: no text encoder and no VAE."""
    pipe: Any = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, *, steps: int = 2, seed: int = 0) -> torch.Tensor:
    """What the pipeline denoises to, 16 x 16 pixels, 9 frames."""
    generator = torch.Generator().manual_seed(7)
    where = pipe._execution_device
    embeds = {name: torch.randn(1, 16, TINY.text, generator=generator).to(where) for name in ("a", "b")}
    result = pipe(
        prompt_embeds=embeds["a"],
        negative_prompt_embeds=embeds["b"],
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    frames: torch.Tensor = result.frames
    return frames
