"""`wan-runtime generate`: its options, and what happens between them and one clip."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from wan_runtime.console import step_bar
from wan_runtime.errors import InvalidOption
from wan_runtime.options import (
    Activation,
    AsJson,
    Attention,
    AttentionEndBlocks,
    AttentionEndSteps,
    Backend,
    CheckpointLow,
    Compute,
    Device,
    Dialect,
    Fuse,
    Reference,
    Skip,
    Weights,
    sizes_of,
)

DTYPES = ("bfloat16", "float16", "float32")


def generate(
    prompt: Annotated[str, typer.Option(help="What the clip is to show.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The .mp4 file to write.")] = Path("clip.mp4"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The transformer's file, of any dialect; default: the bundled tiny model."),
    ] = None,
    checkpoint_low: CheckpointLow = None,
    base: Annotated[
        str | None, typer.Option(help="Diffusers folder or hub id with the text encoder, VAE and tokenizer.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="Another text encoder: a file or a diffusers folder.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE: a file or diffusers folder.")] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="The folder that --lora names files of.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA of --lora-dir, NAME or NAME=STRENGTH; may be given again."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="PNG, JPEG or WebP that the clip starts from.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the clip is not to show.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, such as 832x480.")] = None,
    frames: Annotated[int | None, typer.Option(help="How many frames, 4n+1.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    guidance_2: Annotated[float | None, typer.Option(help="Guidance scale of the low-noise expert.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Flow shift of the scheduler.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first noise; default: a random one.")] = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; default: bfloat16, float32 on a CPU.")
    ] = None,
    dialect: Dialect = None,
    reference: Reference = None,
    weights: Weights = "auto",
    compute: Compute = "auto",
    backend: Backend = "auto",
    attention: Attention = "auto",
    attention_end_blocks: AttentionEndBlocks = None,
    attention_end_steps: AttentionEndSteps = None,
    fuse: Fuse = True,
    activation: Activation = "dynamic",
    skip: Skip = None,
    as_json: AsJson = False,
) -> None:
    """Make one clip and write it as an MP4."""
    from wan_runtime.asking import check_given

    patch_options = {
        "dialect": dialect, "reference": reference, "weights": weights, "compute": compute, "backend": backend,
        "attention": attention, "attention_end_blocks": attention_end_blocks,
        "attention_end_steps": attention_end_steps, "fuse": fuse, "activation": activation, "skip": tuple(skip or ()),
    }  # fmt: skip
    request = {
        "negative_prompt": negative_prompt, **sizes_of(size), "num_frames": frames, "fps": fps,
        "num_inference_steps": steps, "guidance_scale": guidance, "guidance_scale_2": guidance_2,
        "flow_shift": flow_shift, "seed": seed, "lora": _strengths(lora),
    }  # fmt: skip
    _check_output(output)
    check_given(prompt, **request)
    materials = {"image": _start_image(image), "loras": _loras(lora_dir, lora)}
    parts = {
        "checkpoint_low": checkpoint_low, "base": base, "text_encoder": text_encoder, "vae": vae,
        "device": device, "dtype": _dtype(dtype), **patch_options,
    }  # fmt: skip
    _generate(prompt, output, checkpoint, parts, request, materials, as_json)


def _generate(
    prompt: str,
    output: Path,
    checkpoint: Path | None,
    parts: dict[str, Any],
    request: dict[str, Any],
    materials: dict[str, Any],
    as_json: bool,
) -> None:
    import wan_runtime
    from wan_runtime.pipelines import load_prepared
    from wan_runtime.preparing import prepare

    image = materials["image"]
    if checkpoint is None:
        typer.echo(
            "No --checkpoint was given: using the bundled tiny model, which draws moving shapes.", err=True
        )
    found = prepare(checkpoint, **parts)
    asked = found.profile.request(prompt, image=image and image.sha256, **request)
    pipe = load_prepared(found)
    began = time.monotonic()
    with step_bar(asked.num_inference_steps) as on_step:
        clip = wan_runtime.generate(pipe, asked, on_step, **materials)
    seconds = time.monotonic() - began
    wan_runtime.write_video(clip.frames, output, asked.fps, {"comment": f"{prompt} (seed {clip.seed})"})
    count, height, width, _ = clip.frames.shape
    if as_json:
        made = {"output": str(output), "seed": clip.seed, "frames": count, "width": width, "height": height}
        typer.echo(json.dumps({**made, "fps": asked.fps, "seconds": round(seconds, 3)}, indent=2))
    else:
        typer.echo(f"{output}: {count} frames of {width}x{height} in {seconds:.1f} s, seed {clip.seed}")


def _dtype(name: str | None) -> Any:
    if name not in (None, *DTYPES):
        raise InvalidOption(f"--dtype {name!r} is not known; choose from {', '.join(DTYPES)}.")
    import torch

    return name and getattr(torch, name)


def _start_image(path: Path | None) -> Any:
    """Read before the model is loaded, as it may be none."""
    import wan_runtime

    try:
        return path and wan_runtime.open_image(path)
    except OSError as error:
        raise InvalidOption(f"--image {path} cannot be read: {error.strerror}.") from None


def _strengths(given: list[str] | None) -> dict[str, float] | None:
    """From NAME or NAME=STRENGTH, again and again."""
    strengths: dict[str, float] = {}
    for one in given or ():
        name, mark, strength = one.rpartition("=")
        if (name or strength) in strengths:
            raise InvalidOption(f"--lora {name or strength} was given twice.")
        try:
            strengths[name if mark else strength] = float(strength) if mark else 1.0
        except ValueError:
            raise InvalidOption(f"--lora {one!r}: {strength!r} is not a number.") from None
    return strengths or None


def _loras(folder: Path | None, given: list[str] | None) -> Any:
    """The folder's LoRAs, those asked for among them, before the model is loaded."""
    import wan_runtime

    if not given:
        return {}
    if folder is None:
        raise InvalidOption("--lora names a file of a folder: give the folder with --lora-dir.")
    known = wan_runtime.list_loras(folder)
    for name in _strengths(given) or ():
        if name not in known:
            raise InvalidOption(f"--lora {name}: {folder} has {', '.join(known) or 'none'}.")
    return known


def _check_output(output: Path) -> None:
    """Find out before the model is loaded, not after the clip was made."""
    if output.suffix != ".mp4":
        raise InvalidOption(f"--output {output} must end in .mp4.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InvalidOption(f"--output {output} is not a file in a folder that exists.")
