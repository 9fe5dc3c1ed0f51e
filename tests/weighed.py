"""Predicted memory beside the allocator's own count: `python -m tests.weighed [cpu|cuda|kinds]`, for held-out sizes.

On a CPU of the bundled tiny model; on a GPU of a pipeline with Wan2.1's VAE and two blocks of 1.3B's widths, at random;
`kinds` are the image-to-video models, made small, on a CPU.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import wan_runtime
from tests.test_image_to_video import KINDS
from wan_runtime import ClipRequest
from wan_runtime.serve import warming, weighing
from wan_runtime.serve.measuring import count
from wan_runtime.serve.memory import GIB, PHASES, Memory, by_phase, clip_bytes

Size = tuple[int, int, int]  # width, height, frames
TINY: tuple[Size, ...] = (
    (64, 64, 5), (64, 64, 33), (128, 64, 17), (128, 128, 17), (128, 128, 49), (192, 128, 17), (192, 192, 17),
    (256, 256, 9),
)  # fmt: skip
SMALL: tuple[Size, ...] = ((128, 128, 13), (192, 64, 33))
PUBLISHED: tuple[Size, ...] = (
    (416, 240, 33), (640, 352, 17), (832, 480, 17), (832, 480, 49), (832, 480, 81), (480, 832, 33), (1280, 720, 17),
)  # fmt: skip


def published(device: str) -> Any:
    """Wan2.1 T2V-1.3B's sizes with two blocks instead of thirty, FP8, and its VAE, all with random weights."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tiny = wan_runtime.load_pipeline(device="cpu")
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(tiny.tokenizer), d_model=256, d_kv=32, d_ff=512, num_layers=2, num_heads=8
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2, text_dim=256
    )
    transformer = transformer.to(device, torch.bfloat16).eval()
    wan_runtime.patch(transformer)
    pipe = WanPipeline(
        tokenizer=tiny.tokenizer, scheduler=tiny.scheduler, transformer=transformer,
        text_encoder=UMT5EncoderModel(text).to(device, torch.bfloat16).eval(),
        vae=AutoencoderKLWan().to(device).eval().requires_grad_(False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe: Any, size: Size, steps: int = weighing.STEPS) -> ClipRequest:
    """A clip of a size."""
    width, height, frames = size
    practice = warming._practice(wan_runtime.clip_profile(pipe))
    return replace(practice, width=width, height=height, num_frames=frames, num_inference_steps=steps)


def learned(pipe: Any, steps: int = weighing.STEPS) -> Memory:
    """What a server learns of a pipeline that it has warmed up."""
    warming.try_out(pipe)
    return weighing.learn(pipe, warming._practice(wan_runtime.clip_profile(pipe)), warming._blank, steps)


def peak_on_gpu(pipe: Any, request: ClipRequest, memory: Memory) -> int:
    """What torch says that a whole clip took at its most beyond what rested when the model was warmed up."""
    weighing.at_rest(pipe)
    torch.cuda.reset_peak_memory_stats()
    wan_runtime.generate(pipe, request)
    return torch.cuda.max_memory_allocated() - memory.rest


def table(pipe: Any, sizes: Iterable[Size]) -> str:
    """A row for each size: predicted and counted GiB of each phase, and the error of the whole."""
    memory = learned(pipe)
    lines = [
        f"| clip | {' | '.join(PHASES)} | error of the whole |",
        "|---|" + "---|" * len(PHASES) + "---|",
    ]
    for size in sizes:
        asked = clip(pipe, size)
        predicted = by_phase(memory, asked)
        [parts] = count(pipe, [asked], warming._blank)
        counted = {phase: max(parts.get(part, 0) for part in PHASES[phase]) for phase in PHASES}
        most = peak_on_gpu(pipe, asked, memory) if pipe.vae.device.type == "cuda" else max(counted.values())
        cells = [f"{predicted[phase] / GIB:.3f} / {counted[phase] / GIB:.3f}" for phase in PHASES]
        width, height, frames = size
        error = clip_bytes(memory, asked) / most - 1
        lines.append(f"| {width}x{height}, {frames} | {' | '.join(cells)} | {error:+.1%} |")
    return "\n".join(lines)


def kinds() -> str:
    """A table for each image-to-video model."""
    told = []
    for kind, (build, *_) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, base = build(Path(folder))
            pipe = wan_runtime.load_pipeline(checkpoint, base=base, device="cpu")
        told.append(f"{kind}\n\n{table(pipe, SMALL)}\n")
    return "\n".join(told)


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["cuda"]:
            print(table(published("cuda"), PUBLISHED))
        case ["kinds"]:
            print(kinds())
        case _:
            print(table(wan_runtime.load_pipeline(device="cpu"), TINY))
