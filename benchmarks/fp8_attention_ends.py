"""How many blocks and steps at either end have to attend in bf16 under FP8 attention: clips of the tiny model, counted.

    python benchmarks/fp8_attention_ends.py [--count 100] [--steps 20] [--ends 0:0,2:0,2:1] [--output ends.json]

Draws the same prompts with the same seeds from bf16 weights, from FP8 weights with bf16 attention, and from FP8
weights with FP8 attention at each BLOCKS:STEPS of --ends; prints how many clips show what was asked, and how far their
pixels are from the bf16 clips (of 255). On a GPU that has FP8 attention that is what runs; elsewhere it is emulated:
the fused blocks' plain-torch twins make the same codes, with the same scales, and the products of codes are summed in
fp32.

The tiny model attends to 320 tokens, which are short (SHORT), so that limit is lifted here.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import wan_runtime
from wan_runtime.attention import ATTENTIONS, Ends, refused
from wan_runtime.patches import _attending, _attention_processor, _wan_block, scheduled
from wan_runtime.pipelines import load_pipeline
from wan_runtime.scheduling import timesteps
from wan_runtime.tiny.clips import WORK, Drawn, score, table, write
from wan_runtime.tiny.drawing import Ask, asks, draw
from wan_runtime.tiny.variants import checkpoint

EMULATED = "emulated in fp32"


def from_codes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    """Attention on e4m3 codes [batch, tokens, heads, head] with a scale a head each, summed in fp32."""
    q, k, v = (t.float() * s[:, None, :, None] for t, s in zip((q, k, v), scales, strict=True))
    return ATTENTIONS["sdpa"].attend(q, k, v)


def emulate(model: Any, ends: Ends) -> None:
    """FP8 attention in a model on a device that has none."""
    _attention_processor.install(model, "fp8", (str(next(model.parameters()).device.type), model.dtype), ends)
    for block in model.blocks:
        for attention in (block.attn1, block.attn2):
            processor = attention.processor
            processor._beside = ATTENTIONS["sdpa"].attend
            processor.codes = None if processor.codes is None else from_codes
            processor._attend = processor._beside
    assert _wan_block.fuse(model, "TWINS") == []


def model_of(name: str, ends: Ends | None, pipe: Any, real: bool) -> Any:
    options: dict[str, Any] = {"device": pipe.device, "dtype": pipe.transformer.dtype}
    if ends is not None and real:
        options |= {
            "attention": "fp8",
            "attention_end_blocks": ends.blocks,
            "attention_end_steps": ends.steps,
        }
    model = wan_runtime.load(checkpoint(name, WORK), **options)
    if ends is not None and not real:
        emulate(model, ends)
    return model


def drawn(pipe: Any, wanted: list[Ask], steps: int, batch: int, advance: Any) -> Drawn:
    began = time.monotonic()
    with torch.no_grad(), scheduled((pipe.transformer,), timesteps(pipe.scheduler, steps)):
        clips = draw(pipe, wanted, steps, batch, advance)
    return Drawn(clips, time.monotonic() - began)


def ends_of(given: str) -> dict[str, Ends]:
    """Rows of the table from "2:1,0:0"."""
    found = {}
    for pair in given.split(","):
        blocks, _, steps = pair.strip().partition(":")
        if not (blocks.isdecimal() and steps.isdecimal()):
            raise typer.BadParameter(f"--ends {pair!r} is not BLOCKS:STEPS, such as 2:1")
        found[f"FP8, FP8 attention, ends {blocks}:{steps}"] = Ends(int(blocks), int(steps))
    return found


def main(
    count: Annotated[int, typer.Option(help="Prompts; 0 is 100 on a GPU and 8 on a CPU.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps; 0 is 20 on a GPU and 8 on a CPU.")] = 0,
    ends: Annotated[
        str, typer.Option(help="BLOCKS:STEPS at either end in bf16, several with commas.")
    ] = "0:0,1:0,2:0,0:1,0:2,0:4,1:1,2:1,2:2",
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = WORK / "fp8_attention_ends.json",
) -> None:
    """Draws, reads and counts clips of the tiny model with FP8 attention."""
    cuda = torch.cuda.is_available()
    wanted, steps = asks(count or (100 if cuda else 8)), steps or (20 if cuda else 8)
    pipe = load_pipeline()
    refusal = refused("fp8", pipe.device, pipe.transformer.dtype, pipe.transformer.config.attention_head_dim)
    _attending.SHORT = 0
    rows: dict[str, tuple[str, Ends | None]] = {
        "bf16": ("bf16", None),
        "FP8": ("comfy-fp8-scaled", None),
        **{name: ("comfy-fp8-scaled", found) for name, found in ends_of(ends).items()},
    }
    clips: dict[str, Drawn] = {}
    with Progress(console=Console(stderr=True)) as bar:
        for row, (name, found) in rows.items():
            task = bar.add_task(row, total=len(wanted))
            pipe.transformer = model_of(name, found, pipe, refusal is None)
            clips[row] = drawn(pipe, wanted, steps, 34 if cuda else 1, partial(bar.advance, task))
    scores = [score(name, wanted, made, clips["bf16"].clips) for name, made in clips.items()]
    where = torch.cuda.get_device_name() if cuda else "cpu"
    how = "FlashAttention 3" if refusal is None else f"{EMULATED} ({refusal})"
    Console(width=120).print(table(scores), f"{where}, {steps} steps; FP8 attention: {how}")
    write(output, scores, {"device": where, "steps": steps, "fp8_attention": how}, wanted)


if __name__ == "__main__":
    typer.run(main)
