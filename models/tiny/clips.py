"""`make clips`: how often the tiny model's clips show what their prompt says, from every reading of its weights.

Draws the same prompts with the same seeds from the bf16 weights, from the FP8 and NVFP4 files that `convert` makes,
and from misreadings of those; lets the checker read each clip; prints a table, and writes the figures as JSON and
the contact sheet of six prompts. On a GPU in bf16 and in batches, else in fp32 on the CPU, clip by clip.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import wan_runtime
from wan_runtime.pipelines import load_pipeline
from wan_runtime.tiny import checker, path
from wan_runtime.tiny.drawing import Ask, Frames, asks, draw
from wan_runtime.tiny.sheet import contact_sheet
from wan_runtime.tiny.variants import VARIANTS, checkpoint, differences
from wan_runtime.tiny.words import Scene

WORK = path().parent.parent / "build" / "tiny"
SHEET = path() / "sheet.png"
COLUMNS = ("bf16", "comfy-fp8-scaled", "modelopt-nvfp4", "fp8-scales-dropped")
SHOWN = (
    Ask("a large red circle moving right on a white background", 7),
    Ask("a large green square moving up on a black background", 7),
    Ask("a large yellow ring moving left on a navy background", 7),
    Ask("a large purple triangle moving down on a white background", 7),
    Ask("a small cyan square moving right on a gray background", 7),
    Ask("a small pink circle standing still on a black background", 7),
)
console = Console(stderr=True)


@dataclass(frozen=True)
class Drawn:
    """One clip for each ask, and the seconds that all of them took."""

    clips: list[Frames]
    seconds: float


@dataclass(frozen=True)
class Score:
    """How the clips of one variant were read; `right` counts those with all five attributes right.

    `seconds` is the time of all clips drawn from the variant, those of the contact sheet included.
    `from_bf16` is the mean absolute difference of all pixels from the bf16 weights' clips, of 255; None without them.
    """

    variant: str
    clips: int
    right: int
    right_by_attribute: dict[str, int]
    from_bf16: float | None
    seconds: float


def score(name: str, wanted: list[Ask], drawn: Drawn, bf16: list[Frames] | None) -> Score:
    """Reads the clips drawn for `wanted`, and compares them with those of the bf16 weights, if there are any."""
    wrong = [checker.wrong(clip, ask.prompt) for clip, ask in zip(drawn.clips, wanted, strict=True)]
    by_attribute = {field: sum(field not in w for w in wrong) for field in Scene._fields}
    apart = None
    if bf16 is not None:
        pairs = zip(drawn.clips, bf16, strict=True)
        apart = float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in pairs]))
    return Score(name, len(wrong), sum(not w for w in wrong), by_attribute, apart, drawn.seconds)


def table(scores: list[Score]) -> Table:
    """One row a variant, in clips that are right."""
    shown = Table(title=f"clips that show what was asked, of {scores[0].clips}")
    shown.add_column("weights")
    for column in ("all five", *Scene._fields, "from bf16"):
        shown.add_column(column, justify="right")
    for s in scores:
        apart = "" if s.from_bf16 is None else f"{s.from_bf16:.1f}"
        shown.add_row(s.variant, str(s.right), *(str(n) for n in s.right_by_attribute.values()), apart)
    return shown


def check_names(names: list[str]) -> None:
    """The file under diffusers names must hold the same weights; then it draws the same clips."""
    for name in names:
        files = [checkpoint(name, WORK, spelling) for spelling in ("original", "diffusers")]
        one, other = (wan_runtime.load(file, device="cpu", dtype=torch.float32) for file in files)
        if wrong := differences(one, other):
            raise RuntimeError(
                f"{files[0]} and {files[1]} differ in {len(wrong)} tensors, such as {wrong[0]}. They hold the same "
                f"weights under two spellings: delete both, and if they differ again convert or load is wrong."
            )
        console.print(f"{name}: the same weights under original and diffusers names")


def draw_all(pipe: Any, names: list[str], wanted: list[Ask], steps: int, batch: int) -> dict[str, Drawn]:
    """The clips of every variant, and the seconds they took."""
    out = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        for name in names:
            task = bar.add_task(name, total=len(wanted))
            options = {
                "device": pipe.device,
                "dtype": pipe.transformer.dtype,
                "dialect": VARIANTS[name].dialect,
            }
            pipe.transformer = wan_runtime.load(checkpoint(name, WORK), **options)
            began = time.monotonic()
            clips = draw(pipe, wanted, steps, batch, partial(bar.advance, task))
            out[name] = Drawn(clips, time.monotonic() - began)
    return out


def selected(given: str) -> list[str]:
    """The variants of a comma-separated list, in the table's order."""
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in names]


def main(
    count: Annotated[int, typer.Option(help="Prompts; 0 is 100 on a GPU and 24 on a CPU.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps a clip; 0 is 20 on a GPU and 8 on a CPU.")] = 0,
    variants: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = ",".join(VARIANTS),
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = WORK / "clips.json",
    sheet: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = SHEET,
) -> None:
    """Draws, reads and counts the clips of the tiny model."""
    names = selected(variants)
    cuda = torch.cuda.is_available()
    wanted, steps = asks(count or (100 if cuda else 24)), steps or (20 if cuda else 8)
    check_names([name for name in names if VARIANTS[name].kind and not VARIANTS[name].misreading])
    pipe = load_pipeline()
    with_sheet = set(COLUMNS) <= set(names)
    both = wanted + (list(SHOWN) if with_sheet else [])
    drawn = draw_all(pipe, names, both, steps, 34 if cuda else 1)
    first = {name: Drawn(d.clips[: len(wanted)], d.seconds) for name, d in drawn.items()}
    bf16 = first["bf16"].clips if "bf16" in first else None
    scores = [score(name, wanted, d, bf16) for name, d in first.items()]
    Console(width=120).print(table(scores))
    where = torch.cuda.get_device_name() if cuda else "cpu"
    write(output, scores, {"device": where, "dtype": str(pipe.transformer.dtype), "steps": steps}, wanted)
    console.print(f"saved {output}")
    if with_sheet:
        save_sheet(sheet, {name: drawn[name].clips[len(wanted) :] for name in COLUMNS})
    else:
        console.print(f"no contact sheet: it needs the variants {', '.join(COLUMNS)}")


def write(output: Path, scores: list[Score], how: dict[str, object], wanted: list[Ask]) -> None:
    """Saves the figures, and what is needed to draw the same clips again."""
    report = {**how, "scores": [asdict(s) for s in scores], "asks": [asdict(ask) for ask in wanted]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


def save_sheet(out: Path, clips: dict[str, list[Frames]]) -> None:
    """Saves the contact sheet, and says of each of its columns how many clips the checker accepts."""
    labelled = {VARIANTS[name].label: drawn for name, drawn in clips.items()}
    contact_sheet([ask.prompt for ask in SHOWN], labelled).save(out, optimize=True)
    for name, drawn in clips.items():
        right = sum(not checker.wrong(clip, ask.prompt) for clip, ask in zip(drawn, SHOWN, strict=True))
        console.print(f"sheet, {name}: {right} of {len(SHOWN)} right")
    console.print(f"saved {out}")


if __name__ == "__main__":
    typer.run(main)
