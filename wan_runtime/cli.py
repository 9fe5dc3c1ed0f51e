"""`wan-runtime`: inspect, compare and convert checkpoints, check the machine, make a clip, patch a script.

This is where options become arguments. Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wan_runtime.console import FAILED, Commands, complain, show, status_of
from wan_runtime.convert_command import convert
from wan_runtime.errors import AmbiguousDialect, UnknownDialect, WanRuntimeError
from wan_runtime.generate_command import generate
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
)
from wan_runtime.version import VERSION

if TYPE_CHECKING:
    from wan_runtime.undecided import Undecided

app = typer.Typer(
    cls=Commands,
    name="wan-runtime",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run FP8 and NVFP4 WAN video checkpoints, whoever wrote them: right or refused, never noise.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"wan-runtime {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run FP8 and NVFP4 WAN video checkpoints, whoever wrote them: right or refused, never noise."""


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(help="Checkpoints (.safetensors) or folders that hold one.")],
    dialect: Dialect = None,
    reference: Reference = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is and who wrote it, from its header alone. A bad file does not hide the others."""
    from wan_runtime.later import import_later

    import_later("torch")  # a header needs none of it, and importing it takes longer than all the rest
    from wan_runtime.inspecting import inspect_checkpoint

    fields: list[dict[str, object]] = []
    statuses = [0]
    for file in files:
        try:
            result = inspect_checkpoint(file, dialect, reference)
        except WanRuntimeError as error:
            found = _undecided(error)
            if found is not None and not as_json:
                show(found, False)
            complain(str(error))
            statuses.append(status_of(error))
            fields.append({"path": str(file), "error": str(error)} if found is None else found.to_dict())
            continue
        fields.append(result.to_dict())
        if not as_json:
            show(result, False)
    if as_json:
        typer.echo(json.dumps(fields, indent=2))
    raise typer.Exit(max(statuses))


def _undecided(error: WanRuntimeError) -> Undecided | None:
    """What can be told of a file whose dialect is not known; None where it was refused for another reason."""
    if not isinstance(error, AmbiguousDialect | UnknownDialect):
        return None
    from wan_runtime.undecided import describe_undecided

    return describe_undecided(error)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The file that works, or that the host expects.")],
    b: Annotated[Path, typer.Argument(help="The file in question.")],
    layer: Annotated[
        str | None, typer.Option(help="The layer to show; default: blocks.0.cross_attn.k.")
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Read the weights too: how far apart they are, layer by layer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put two checkpoints side by side: how they differ, what a host would get wrong, what to do."""
    import wan_runtime

    show(wan_runtime.compare(a, b, layer=layer, errors=errors), as_json)


app.command()(convert)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: GPU, driver, libraries, and every multiplier by running it."""
    from wan_runtime.doctor import examine

    show(examine(), as_json)


@app.command()
def bench(
    dim: Annotated[
        int | None, typer.Option(help="Width of the model; default: 5120, or 512 on a CPU.")
    ] = None,
    ffn: Annotated[
        int | None, typer.Option(help="Width of the feed-forward; default: 13824, or 2048 on a CPU.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows; default: 32760, or 1024 on a CPU.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the median is shown.")] = 20,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time a WAN block's Linears with every multiplier of this machine, against bf16."""
    from wan_runtime.bench import default_sizes, measure

    given = {
        name: value for name, value in (("dim", dim), ("ffn", ffn), ("tokens", tokens)) if value is not None
    }
    show(measure(dataclasses.replace(default_sizes(device), **given), device=device, rounds=rounds), as_json)


app.command()(generate)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The Python script to run.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Load this file in place of the script's weights.")
    ] = None,
    checkpoint_low: CheckpointLow = None,
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
) -> None:
    """Run an unmodified script with every WAN model patched as it is loaded: run [OPTIONS] -- SCRIPT [ARGS]."""
    from wan_runtime.arming import run_script

    options = {
        "checkpoint": checkpoint, "checkpoint_low": checkpoint_low, "dialect": dialect, "reference": reference,
        "weights": weights, "compute": compute, "backend": backend, "attention": attention,
        "attention_end_blocks": attention_end_blocks, "attention_end_steps": attention_end_steps, "fuse": fuse,
        "activation": activation, "skip": tuple(skip or ()),
    }  # fmt: skip
    try:
        run_script(str(script), list(args or ()), options)
    except WanRuntimeError:
        raise
    except Exception as error:  # the script's own, shown as Python shows it
        traceback.print_exc()
        raise typer.Exit(FAILED) from error


if __name__ == "__main__":
    app()
