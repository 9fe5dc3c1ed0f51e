"""The options that several commands of `wan-runtime` share, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wan_runtime.errors import InvalidOption

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Dialect = Annotated[
    str | None,
    typer.Option(
        help="Who wrote the file, where its marks do not say: comfy, modelopt, comfy_scaled_fp8, ..."
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(help="The bf16 file it was made from; settles a file that several dialects fit."),
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: the GPU if there is one.")]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Modules to leave unquantised, a pattern such as 'blocks.0.*'; may be given again."),
]
Weights = Annotated[
    str, typer.Option(help="Format to hold the weights in: auto, keep, fp8, nvfp4, mxfp8, int8, ...")
]
Compute = Annotated[str, typer.Option(help="Precision to multiply in: auto, fp8, bf16, fp32.")]
Backend = Annotated[str, typer.Option(help="Who multiplies: auto, torch, te, reference.")]
Attention = Annotated[str, typer.Option(help="Attention kernel: auto, fa3, cudnn, sdpa, fp8.")]
AttentionEndBlocks = Annotated[
    int | None,
    typer.Option(
        min=0, help="With --attention fp8: blocks at either end of the model that attend in bf16 (default 1)."
    ),
]
AttentionEndSteps = Annotated[
    int | None,
    typer.Option(
        min=0, help="With --attention fp8: steps at either end of a clip that attend in bf16 (default 1)."
    ),
]
Fuse = Annotated[
    bool, typer.Option("--fuse/--no-fuse", help="Use the fused block forward where there is one.")
]
Activation = Annotated[
    str, typer.Option(help="Activation scales: dynamic (one a token) or static (the file's input_scale).")
]
CheckpointLow = Annotated[Path | None, typer.Option(help="The low-noise expert of a two-expert model.")]


def sizes_of(size: str | None) -> dict[str, int]:
    """Width and height in pixels from "832x480"; nothing from nothing."""
    if size is None:
        return {}
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InvalidOption(f"--size {size!r} is not WIDTHxHEIGHT in pixels, such as 832x480.")
    return {"width": int(width), "height": int(height)}
