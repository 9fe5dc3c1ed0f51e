"""The patched tiny model inside the real WanPipeline on a GPU: every offload moves its bytes and changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from wan_runtime.patches import _patch_embedding

pytestmark = pytest.mark.gpu

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
TRANSFORMER = TINY / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["comfy-fp8-scaled", "modelopt-nvfp4"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / f"{request.param}.safetensors"
    wan_runtime.convert(TRANSFORMER, path, to=request.param, names="original")
    return path


def _pipeline(checkpoint: Path, device: str, fuse: bool = True) -> Any:
    from diffusers import WanPipeline

    transformer = wan_runtime.load(checkpoint, device=device, fuse=fuse)
    pipe = WanPipeline.from_pretrained(TINY, transformer=transformer, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    latents: torch.Tensor = pipe(
        "a large red circle moving right on a black background", height=128, width=128, num_frames=17,
        num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="latent",
    ).frames  # fmt: skip
    return latents.float().cpu()


def _resident(checkpoint: Path, fuse: bool) -> torch.Tensor:
    pipe = _pipeline(checkpoint, "cuda", fuse=fuse).to("cuda")
    _patch_embedding.fuse(pipe.transformer)  # what is called whole stays fused under hooks
    return _latents(pipe)


def _payload_bytes_on_gpu(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.dtype is torch.uint8 and p.device.type == "cuda")


def _group(stream: bool) -> Callable[[Any], None]:
    def enable(pipe: Any) -> None:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level",
            use_stream=stream,
        )  # fmt: skip
        for part in (pipe.text_encoder, pipe.vae):
            part.to("cuda")

    return enable


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group leaf_level": _group(stream=False),
    "group leaf_level with a stream": _group(stream=True),
}


@pytest.mark.parametrize("kind", OFFLOADS)
def test_pipeline_offload_moves_the_payload_and_changes_nothing(kind: str, checkpoint: Path) -> None:
    expected = _resident(checkpoint, fuse=kind == "model")  # hooks on every leaf: the host's own forward
    pipe = _pipeline(checkpoint, "cpu")
    computes = {d.compute for d in wan_runtime.patch(pipe.transformer).quantised}
    assert computes == {"fp8"}  # planned for the GPU although the model waits on the CPU
    OFFLOADS[kind](pipe)
    assert torch.equal(_latents(pipe), expected)
    gc.collect()
    if kind == "model":
        pipe.maybe_free_model_hooks()
    assert _payload_bytes_on_gpu(pipe.transformer) == 0


def test_accelerate_cpu_offload_moves_the_payload(checkpoint: Path) -> None:
    from accelerate import cpu_offload

    expected = _resident(checkpoint, fuse=False)
    pipe = _pipeline(checkpoint, "cpu")
    cpu_offload(pipe.transformer, execution_device=torch.device("cuda"))
    for part in (pipe.text_encoder, pipe.vae):
        part.to("cuda")
    assert torch.equal(_latents(pipe), expected)
    assert _payload_bytes_on_gpu(pipe.transformer) == 0


def test_fp32_residents_survive_the_pipelines_moves(checkpoint: Path) -> None:
    pipe = _pipeline(checkpoint, "cpu").to("cuda", torch.bfloat16)
    assert pipe.transformer.dtype is torch.bfloat16
    for name, parameter in pipe.transformer.named_parameters():
        small = "norm" in name or "scale_shift_table" in name or name.endswith("bias")
        if small:
            assert parameter.dtype is torch.float32, name
