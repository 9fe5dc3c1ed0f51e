"""All stages one after the other, each saved before anything that could fail: what a GPU lent by the minute needs.

OUT/state/vae, OUT/state/vae_optimiser.safetensors   stage 1 in fp32 and its moments: `resumed` goes on from them;
                                                    the decoder's own training changes the first of them
OUT/vae                                             stage 1 in bf16, as the pipeline will have it
OUT/pipeline                                        the pipeline, bf16
OUT/vae.png, samples.png, scores.json               to look at
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from rich.console import Console
from safetensors.torch import load_file

from wan_runtime.pipelines import load_pipeline

from .. import clips, drawing, whole, words
from . import decoder, parts, scenes, sheets, transformer, vae

HUE_SHARE = 0.9  # of what rendered clips give: below it, a transformer would learn the wrong colours


@dataclass(frozen=True)
class Run:
    """What to train, for how long, and how much of it to look at. No seconds: the stage's saved result is used."""

    out: Path
    tokenizer: Path
    vae_seconds: float
    transformer_seconds: float
    decoder_seconds: float = 0.0
    parts: Path | None = None
    resumed: bool = False
    vae: vae.VaeOptions = field(default_factory=vae.VaeOptions)
    decoder: decoder.DecoderOptions = field(default_factory=decoder.DecoderOptions)
    transformer: transformer.TransformerOptions = field(default_factory=transformer.TransformerOptions)
    looked_at: int = 64  # unseen clips for PSNR and hue
    scored: int = 100
    steps: int = 20
    any_hue: bool = False

    @property
    def state(self) -> Path:
        return self.out / "state"

    @property
    def weights(self) -> Path:
        return self.state / "vae" / "diffusion_pytorch_model.safetensors"

    @property
    def pipeline(self) -> Path:
        return self.out / "pipeline"


class PoorColours(Exception):
    """The VAE draws too many clips in the wrong hue to train a transformer on its latents."""


def run(plan: Run, device: torch.device) -> None:
    """Trains, saves and scores; everything is on the disk when it raises PoorColours."""
    began = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {what}", flush=True)

    if plan.vae_seconds:
        train_vae(plan, device)
        tell("vae saved")
    if plan.decoder_seconds:
        train_decoder(plan, device)
        tell("decoder saved")
    round_vae(plan)
    judge_vae(plan, device)
    tell("vae looked at")
    if plan.transformer_seconds:
        train_transformer(plan, device)
        tell("pipeline saved")
    elif plan.decoder_seconds and plan.pipeline.exists():
        redecode(plan)
        tell("pipeline saved with its new decoder")
    if (plan.pipeline / parts.TRANSFORMER).exists():
        look(plan, device)
        tell("scored")


def train_vae(plan: Run, device: torch.device) -> None:
    """Stage 1, from the start or from what an earlier run left."""
    plan.state.mkdir(parents=True, exist_ok=True)
    resumed = plan.resumed and plan.weights.exists()
    print(f"vae: {'going on from ' + str(plan.weights) if resumed else 'from the start'}", flush=True)
    vae.train(plan.vae_seconds, plan.state, device, resumed, plan.vae)
    parts.put(plan.weights, plan.parts, parts.VAE)
    parts.put(plan.state / parts.OPTIMISER, plan.parts)


def train_decoder(plan: Run, device: torch.device) -> None:
    """The decoder of what stage 1 left; its encoder, and so the latents, stay as they are."""
    decoder.train(plan.decoder_seconds, plan.weights, device, plan.vae, plan.decoder)
    parts.put(plan.weights, plan.parts, parts.VAE)


def redecode(plan: Run) -> None:
    """Gives the pipeline the new decoder; its transformer, and what it knows of the latents, stay."""
    file = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(plan.out / "vae" / file, plan.pipeline / "vae" / file)
    parts.pack(plan.pipeline, plan.parts)


def round_vae(plan: Run) -> None:
    """Saves the VAE in bf16, which is what the transformer learns to draw for."""
    rounded = vae.build()
    rounded.load_state_dict(load_file(plan.weights))
    rounded.to(torch.bfloat16).save_pretrained(plan.out / "vae")


def judge_vae(plan: Run, device: torch.device) -> None:
    """Prints PSNR and hue of the saved VAE, and raises PoorColours if its hue is far from that of rendered clips."""
    trained = AutoencoderKLWan.from_pretrained(plan.out / "vae", torch_dtype=torch.float32).to(device).eval()
    with torch.backends.cudnn.flags(benchmark=False):
        psnr, frames = vae.evaluate(trained, plan.looked_at)
        drawn, rendered = vae.hue(trained, plan.looked_at)
        sheets.vae_sheet(trained, plan.out / "vae.png", min(6, plan.looked_at))
        readable(trained, plan.looked_at)
    parts.put(plan.out / "vae.png", plan.parts)
    print(f"vae, bf16 weights: {psnr:.2f} dB on {plan.looked_at} unseen clips", flush=True)
    print(f"vae, by frame: {[round(f, 1) for f in frames]}", flush=True)
    print(f"vae, hue right: {drawn:.3f} of them, and {rendered:.3f} of the rendered clips", flush=True)
    if not plan.any_hue and drawn < HUE_SHARE * rendered:
        raise PoorColours(
            f"The VAE draws {drawn:.3f} of unseen clips in the right hue; {HUE_SHARE} x {rendered:.3f} are wanted. "
            f"It is saved in {plan.state}: train it on with --resume."
        )


@torch.no_grad()
def readable(trained: AutoencoderKLWan, count: int) -> None:
    """Prints how many unseen clips the checker reads right, rendered and as the VAE draws them.

    No transformer can draw better than its VAE: the second row is the most that the pipeline can reach.
    """
    device = next(trained.parameters()).device
    generator = torch.Generator(device).manual_seed(10_003)
    wanted, pairs = [], []
    for classes in scenes.sample(count, generator).split(8):
        clip = scenes.render(classes, generator)
        wanted += [drawing.Ask(words.prompt(words.named(row)), 0) for row in classes.tolist()]
        pairs.append(
            (drawing.pixels(clip), drawing.pixels(whole.decode(trained, whole.encode(trained, clip)[0])))
        )
    scores = []
    for i, name in enumerate(("rendered", "vae")):
        frames = [clip for pair in pairs for clip in pair[i]]
        scores.append(clips.score(name, wanted, clips.Drawn(frames, 0.0), None))
    Console(width=110).print(clips.table(scores))


def train_transformer(plan: Run, device: torch.device) -> None:
    """Stage 2, on the latents of the VAE as it was saved in bf16."""
    resumed = plan.pipeline if plan.resumed and (plan.pipeline / parts.TRANSFORMER).exists() else None
    folders = transformer.Folders(plan.out / "vae", plan.tokenizer, plan.pipeline, resumed)
    print(f"transformer: {'going on from ' + str(resumed) if resumed else 'from the start'}", flush=True)
    transformer.train(folders, plan.transformer_seconds, device, plan.transformer)
    parts.pack(plan.pipeline, plan.parts)


def look(plan: Run, device: torch.device) -> None:
    """Draws the sample sheet and scores clips with the checker, from the pipeline read again from the disk."""
    torch.backends.cudnn.benchmark = False
    pipe = load_pipeline(plan.pipeline / parts.TRANSFORMER, base=plan.pipeline, device=device)
    batch = 34 if device.type == "cuda" else 1
    samples = [drawing.Ask(prompt, 1) for prompt in sheets.PROMPTS[: plan.scored]]
    sheets.sample_sheet(drawing.draw(pipe, samples, plan.steps, batch), plan.out / "samples.png")
    parts.put(plan.out / "samples.png", plan.parts)
    wanted, began = drawing.asks(plan.scored), time.monotonic()
    drawn = drawing.draw(pipe, wanted, plan.steps, batch)
    scores = [clips.score("bf16", wanted, clips.Drawn(drawn, time.monotonic() - began), None)]
    Console(width=110).print(clips.table(scores))
    (plan.out / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n")
    parts.put(plan.out / "scores.json", plan.parts)
