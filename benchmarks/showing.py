"""README.md's tables of the forwards and the plot beside the results, made of what benchmarks/suite.py kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MODELS = ("14B 480p", "14B 720p", "5B 720p", "1.3B 480p")
RATIO_TO = "diffusers bf16 cudnn compiled"
HEADS = (
    "weights, attention", "a forward", "ratio", "products, attention, rest: ms", "first call", "peak memory", "error"
)  # fmt: skip
WORDS = {
    "te": "Transformer Engine",
    "kitchen": "comfy-kitchen",
    "fp8": "FP8",
    "nvfp4": "NVFP4",
    "sdpa": "torch's choice",
    "cudnn": "cuDNN",
    "fa3": "FA3",
    "fp8attn": "FP8 attention",
    "layerwise": "layerwise casting",
}
OURS, THEIRS = "#2f6fde", "#b8bec8"
PANEL, LABEL, BAR = 430, 222, 145  # pixels of width: a model's panel, its labels, its longest bar
LINE = 15  # pixels from row to row
STYLE = "font-family: sans-serif; font-size: 10.5px; fill: #555"

Row = dict[str, Any]


def table(rows: list[Row], again: list[Row]) -> str:
    """A table a model, the fastest last: ours are bold, a raised number is the later start that a row is of. All but
    the first fold. `again` holds what later starts ran again, as suite.py keeps it."""
    bases = {
        (row["model"], row.get("run")): float(row["step_s"])
        for row in [*rows, *again]
        if row["config"] == RATIO_TO
    }
    first, *others = by_model(rows)
    lines = _table(*first, bases)
    if others:
        summary = ", ".join(model for model, _ in others)
        lines += ["", f"<details><summary>The same for {summary}</summary>"]
        for model, of_model in others:
            lines += ["", *_table(model, of_model, bases)]
        lines += ["", "</details>"]
    return "\n".join(lines)


def by_model(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each model, the slowest first."""
    slowest = sorted(rows, key=lambda row: -row["step_s"])
    grouped = ((model, [row for row in slowest if row["model"] == model]) for model in MODELS)
    return [(model, of_model) for model, of_model in grouped if of_model]


def _table(model: str, rows: list[Row], bases: dict[tuple[str, int | None], float]) -> list[str]:
    """`bases`: what RATIO_TO took, by model and start; where a start did not run it, the first start's counts, and
    where neither did there is no ratio."""
    lines = [f"| {model}: {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for row in rows:
        who, step, run = words(row["config"]), f"{row['step_s']:.3f} s", row.get("run")
        base = bases.get((model, run), bases.get((model, None)))
        ratio = f"{row['step_s'] / base:.3f}" if base else "not measured"
        if _ours(row):
            who, step = f"**{who}**", f"**{step}**"
        cells = [
            who + (f" <sup>{run}</sup>" if run else ""), step, ratio, _parts(row),
            f"{row['first_s']:.1f} s", f"{row.get('peak_gib', 0):.1f} GiB", _error(row),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def words(config: str) -> str:
    """A configuration as a reader calls it."""
    who, *what = config.split()
    return f"{WORDS.get(who, who)}: {', '.join(WORDS.get(word, word) for word in what)}"


def _ours(row: Row) -> bool:
    return str(row["config"]).startswith("ours")


def _parts(row: Row) -> str:
    """A profiled forward's milliseconds by kind of kernel."""
    parts = row.get("parts_ms", {})
    return (
        ", ".join(f"{parts[kind]:.0f}" for kind in ("gemm", "attention", "rest")) if parts else "not profiled"
    )


def _error(row: Row) -> str:
    return f"{row['relerr']:.2g}" if "relerr" in row else "not measured"


def plot(rows: list[Row]) -> str:
    """Seconds a forward as horizontal bars, ours in colour: a panel a model, two beside each other."""
    body: list[str] = []
    top = 0
    panels = by_model(rows)
    for pair in (panels[at : at + 2] for at in range(0, len(panels), 2)):
        for side, (model, of_model) in enumerate(pair):
            body += _panel(model, of_model, side * PANEL, top)
        top += LINE * (2 + max(len(of_model) for _, of_model in pair))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * PANEL}" height="{top}" style="{STYLE}">'
    return "\n".join([head, *body, "</svg>", ""])


def _panel(model: str, rows: list[Row], left: int, top: int) -> list[str]:
    start, longest = left + LABEL, max(row["step_s"] for row in rows)
    parts = [f'<text x="{start}" y="{top + 12}" font-weight="bold">{model}</text>']
    for at, row in enumerate(rows, start=1):
        y, width = top + at * LINE + 3, BAR * row["step_s"] / longest
        parts.append(
            f'<text x="{start - 6}" y="{y + 9}" text-anchor="end">{words(row["config"])}</text>'
            f'<rect x="{start}" y="{y}" width="{width:.0f}" height="11" fill="{OURS if _ours(row) else THEIRS}"/>'
            f'<text x="{start + 5 + width:.0f}" y="{y + 9}">{row["step_s"]:.2f} s</text>'
        )
    return parts
