"""`python -m wan_runtime.tiny.train tokenizer|vae|transformer ...`. Each stage saves before it returns."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from . import scenes, sheets, tokenizer, transformer, vae

TINY = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    """The command line of all stages."""
    top = argparse.ArgumentParser(prog="python -m wan_runtime.tiny.train", description=__doc__)
    stages = top.add_subparsers(dest="stage", required=True)
    words = stages.add_parser("tokenizer", help="train the vocabulary on every prompt")
    words.add_argument("--out", type=Path, required=True)
    first = stages.add_parser("vae", help="stage 1; --resume goes on from what --out holds")
    first.add_argument("--seconds", type=float, required=True)
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--batch", type=int, default=8)
    first.add_argument("--peak", type=float, default=6e-4)
    first.add_argument("--resolution", type=int, default=scenes.RESOLUTION, help="less only to try it out")
    second = stages.add_parser("transformer", help="stage 2: text encoder and transformer")
    second.add_argument("--vae", type=Path, required=True, help="the vae/ folder of stage 1")
    second.add_argument("--tokenizer", type=Path, default=TINY / "tokenizer")
    second.add_argument("--seconds", type=float, required=True)
    second.add_argument(
        "--resume", type=Path, help="a pipeline whose transformer and text encoder to go on from"
    )
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--clips", type=int, default=8192)
    second.add_argument("--batch", type=int, default=256)
    second.add_argument("--compile", action="store_true")
    second.add_argument("--sample-steps", type=int, default=20)
    return top


def run_vae(given: argparse.Namespace, device: torch.device) -> None:
    """Stage 1 and its sheet."""
    options = vae.VaeOptions(batch=given.batch, peak=given.peak, resolution=given.resolution)
    given.out.mkdir(parents=True, exist_ok=True)
    vae.train(given.seconds, given.out, device, given.resume, options)
    trained = AutoencoderKLWan.from_pretrained(given.out / "vae").to(device)
    with torch.backends.cudnn.flags(benchmark=False):
        sheets.vae_sheet(trained, given.out / "vae.png")


def run_transformer(given: argparse.Namespace, device: torch.device) -> None:
    """Stage 2, its sheet, and the VAE's PSNR once more with the bf16 weights that were saved."""
    options = transformer.TransformerOptions(clips=given.clips, batch=given.batch, compiled=given.compile)
    folders = transformer.Folders(given.vae, given.tokenizer, given.out, given.resume)
    transformer.train(folders, given.seconds, device, options)
    # Read again from the disk: what is looked at is what was saved.
    pipeline = WanPipeline.from_pretrained(given.out, torch_dtype=torch.float32).to(device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = False
    print(f"vae with bf16 weights: {vae.evaluate(pipeline.vae, 32 if cuda else 1)[0]:.2f} dB", flush=True)
    prompts = None if cuda else sheets.PROMPTS[:1]
    sheets.sample_sheet(pipeline, given.out / "samples.png", given.sample_steps, prompts)


def main() -> None:
    """Runs one stage on the GPU if there is one."""
    given = parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if given.stage == "tokenizer":
        tokenizer.train(given.out)
    elif given.stage == "vae":
        run_vae(given, device)
    else:
        run_transformer(given, device)


if __name__ == "__main__":
    main()
