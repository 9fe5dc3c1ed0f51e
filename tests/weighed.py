"""Predicted memory beside the allocator's own count: `python -m tests.weighed [cpu|cuda]` prints it for held-out sizes.

On a CPU of the bundled tiny model; on a GPU of a pipeline with Wan2.1's VAE and two blocks of 1.3B's widths, at random.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

import wan_runtime
from wan_runtime import ClipRequest
from wan_runtime.serve import weighing
from wan_runtime.serve.measuring import count
from wan_runtime.serve.memory import GIB, PHASES, Memory, by_phase, clip_bytes

Size = tuple[int, int, int]  # width, height, frames
TINY: tuple[Size, ...] = (
    (64, 64, 5), (64, 64, 33), (128, 64, 17), (128, 128, 17), (128, 128, 49), (192, 128, 17), (192, 192, 17),
    (256, 256, 9),
)  # fmt: skip
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
    practice = wan_runtime.clip_profile(pipe).request("a red circle", seed=0)
    return replace(practice, width=width, height=height, num_frames=frames, num_inference_steps=steps)


def learned(pipe: Any, steps: int = weighing.STEPS) -> Memory:
    """What a server learns of a pipeline that it has warmed up."""
    profile = wan_runtime.clip_profile(pipe)
    wan_runtime.generate(pipe, clip(pipe, (128, 128, 5), 1))
    return weighing.learn(pipe, profile.request("warm-up", seed=0), lambda _: None, steps)


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
        [parts] = count(pipe, [asked], lambda _: None)
        counted = {phase: max(parts.get(part, 0) for part in PHASES[phase]) for phase in PHASES}
        most = peak_on_gpu(pipe, asked, memory) if pipe.vae.device.type == "cuda" else max(counted.values())
        cells = [f"{predicted[phase] / GIB:.3f} / {counted[phase] / GIB:.3f}" for phase in PHASES]
        width, height, frames = size
        error = clip_bytes(memory, asked) / most - 1
        lines.append(f"| {width}x{height}, {frames} | {' | '.join(cells)} | {error:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    on_gpu = sys.argv[1:] == ["cuda"]
    torch.set_num_threads(1)
    print(
        table(
            published("cuda") if on_gpu else wan_runtime.load_pipeline(device="cpu"),
            PUBLISHED if on_gpu else TINY,
        )
    )
