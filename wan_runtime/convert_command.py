"""`wan-runtime convert`: its options, and what happens between them and `wan_runtime.convert`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from wan_runtime.console import show, step_bar
from wan_runtime.errors import InvalidOption
from wan_runtime.options import AsJson, CheckpointLow, Device, Dialect, Reference, sizes_of

TARGETS = (
    "bf16, comfy-fp8-scaled, comfy-fp8, comfy-nvfp4, modelopt-fp8, modelopt-nvfp4, lightx2v-fp8, lightx2v-nvfp4 or "
    "mxfp8."
)
Keep = Annotated[
    list[str] | None,
    typer.Option(help="Modules to leave unquantised, a pattern such as 'blocks.0.*'; may be given again."),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(help="Run the model over these prompts, one a line, and write static input scales."),
]


def convert(
    src: Annotated[Path, typer.Argument(help="The checkpoint to read.")],
    dst: Annotated[
        Path, typer.Argument(help="The .safetensors file to write; replaced once it is complete.")
    ],
    to: Annotated[str, typer.Option(help=TARGETS, show_default=False)],
    names: Annotated[str, typer.Option(help="Module names to write: original, diffusers or keep.")] = "keep",
    dialect: Dialect = None,
    reference: Reference = None,
    keep: Keep = None,
    scale: Annotated[
        str, typer.Option(help="How scales are chosen: amax, or mse (searched for the least squared error).")
    ] = "amax",
    per_channel: Annotated[
        bool,
        typer.Option("--per-channel", help="FP8 with one scale an output channel, where the target has it."),
    ] = False,
    rest_dtype: Annotated[
        str,
        typer.Option(
            help="What is not quantised: auto (norms, biases, modulation fp32), keep, fp32, bf16, fp16."
        ),
    ] = "auto",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="List every layer's error, and which layers to --keep.")
    ] = False,
    calibrate: Calibrate = None,
    base: Annotated[
        str | None, typer.Option(help="With --calibrate: diffusers folder or hub id of the other parts.")
    ] = None,
    checkpoint_low: CheckpointLow = None,
    checkpoint_high: Annotated[
        Path | None, typer.Option(help="With --calibrate: the high-noise expert, where SRC is the low one.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="With --calibrate: WIDTHxHEIGHT of the clips.")] = None,
    frames: Annotated[int | None, typer.Option(help="With --calibrate: frames of the clips, 4n+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="With --calibrate: denoising steps of the clips.")] = None,
    device: Device = None,
    threads: Annotated[
        int | None, typer.Option(help="Layers to work on at a time; default: the number of cores, at most 4.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another dialect, format or spelling; exact where both hold the same format."""
    import wan_runtime

    settled: dict[str, Any] = {"dialect": dialect, "reference": reference, "device": device}
    run = {
        "base": base, "checkpoint_low": checkpoint_low, "checkpoint_high": checkpoint_high, "size": size,
        "frames": frames, "steps": steps,
    }  # fmt: skip
    activations = _calibration(src, calibrate, {**settled, **run})
    report = wan_runtime.convert(
        src, dst, to, names, keep=tuple(keep or ()), scale=scale, per_channel=per_channel, rest_dtype=rest_dtype,
        activations=activations, threads=threads, **settled,
    )  # fmt: skip
    show(report, as_json)
    if sensitivity and not as_json:
        show(report.sensitivity, False)


def _calibration(
    src: Path, prompts: Path | None, given: dict[str, Any]
) -> Callable[[], dict[str, float]] | None:
    """A run that `convert` starts once everything else has been checked; None where none is asked for."""
    if prompts is None:
        _refuse_ignored(given)
        return None
    from wan_runtime.calibrating import calibrate, read_prompts

    sizes = {**sizes_of(given.pop("size")), "num_frames": given.pop("frames")}
    request = {**sizes, "num_inference_steps": given.pop("steps")}
    said = read_prompts(prompts)

    def run() -> dict[str, float]:
        with step_bar(1) as on_step:
            return calibrate(src, said, request=request, on_step=on_step, **given)

    return run


def _refuse_ignored(given: Mapping[str, Any]) -> None:
    """Options of a calibration mean nothing without one."""
    for_run = ("base", "checkpoint_low", "checkpoint_high", "size", "frames", "steps")
    alone = [f"--{name.replace('_', '-')}" for name in for_run if given[name] is not None]
    if alone:
        raise InvalidOption(f"{', '.join(alone)}: only with --calibrate, whose clips they describe.")
