"""`python -m wan_runtime.tiny.train all|tokenizer|unpack`: trains the tiny pipeline, from a checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import both, parts, scenes, tokenizer
from .decoder import DecoderOptions
from .transformer import TransformerOptions
from .vae import VaeOptions

TINY = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m wan_runtime.tiny.train", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    words = commands.add_parser("tokenizer", help="train the vocabulary on every prompt")
    words.add_argument("--out", type=Path, required=True)
    laid = commands.add_parser("unpack", help="lay the parts of a run out as folders")
    laid.add_argument("parts", type=Path)
    where = laid.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="the pipeline, such as models/tiny")
    where.add_argument("--run", type=Path, help="all of the run, for `all --resume --out` to go on from")
    every = commands.add_parser(
        "all", help="VAE, decoder, transformer, then 100 clips scored; 0 seconds skip a stage"
    )
    every.add_argument("--out", type=Path, required=True)
    every.add_argument("--vae-seconds", type=float, default=180)
    every.add_argument(
        "--decoder-seconds", type=float, default=0, help="on noisy latents; the latents stay what they are"
    )
    every.add_argument("--transformer-seconds", type=float, default=200)
    every.add_argument("--parts", type=Path, help="also put every result here, in 8 files below 16 MiB")
    every.add_argument(
        "--resume", action="store_true", help="go on from what --out holds, each stage from its own"
    )
    every.add_argument("--tokenizer", type=Path, default=TINY / "tokenizer")
    every.add_argument(
        "--vae-peak", type=float, default=VaeOptions.peak, help="4e-4 is right for a resumed run"
    )
    every.add_argument("--decoder-peak", type=float, default=DecoderOptions.peak)
    every.add_argument(
        "--decoder-noise", type=float, default=DecoderOptions.noise, help="in deviations of a channel"
    )
    every.add_argument(
        "--transformer-peak",
        type=float,
        default=TransformerOptions.peak,
        help="6e-4 is right for a resumed run",
    )
    every.add_argument("--no-compile", action="store_true", help="leave the transformer's blocks uncompiled")
    every.add_argument("--scored", type=int, default=100, help="clips that the checker reads at the end")
    small = every.add_argument_group("smaller, only to try it out")
    small.add_argument("--resolution", type=int, default=scenes.RESOLUTION)
    small.add_argument("--vae-batch", type=int, default=VaeOptions.batch)
    small.add_argument("--clips", type=int, default=TransformerOptions.clips)
    small.add_argument("--batch", type=int, default=TransformerOptions.batch)
    small.add_argument("--looked-at", type=int, default=64)
    small.add_argument("--steps", type=int, default=20)
    small.add_argument("--any-hue", action="store_true", help="go on however poor the colours are")
    return top


def plan(given: argparse.Namespace, device: torch.device) -> both.Run:
    """The run that was asked for."""
    compiled = device.type == "cuda" and not given.no_compile
    return both.Run(
        out=given.out,
        tokenizer=given.tokenizer,
        vae_seconds=given.vae_seconds,
        transformer_seconds=given.transformer_seconds,
        decoder_seconds=given.decoder_seconds,
        parts=given.parts,
        resumed=given.resume,
        vae=VaeOptions(batch=given.vae_batch, peak=given.vae_peak, resolution=given.resolution),
        decoder=DecoderOptions(given.decoder_peak, given.decoder_noise),
        transformer=TransformerOptions(
            clips=given.clips, batch=given.batch, peak=given.transformer_peak, compiled=compiled
        ),
        looked_at=given.looked_at,
        scored=given.scored,
        steps=given.steps,
        any_hue=given.any_hue,
    )


def main() -> None:
    """Runs one command, on the GPU if there is one."""
    given = parser().parse_args()
    if given.command == "tokenizer":
        tokenizer.train(given.out)
        return
    if given.command == "unpack":
        if given.out:
            parts.unpack(given.parts, given.out)
        else:
            parts.restore(given.parts, given.run)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    try:
        both.run(plan(given, device), device)
    except both.PoorColours as error:
        print(error, flush=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
