"""Runs the benchmarks and keeps what they measured: `python benchmarks/suite.py benchmarks/results/h200.json`.

    --model MODEL      this model only; may be given again, as --only may
    --only WORDS       configurations that hold every word
    --linear           the linears too
    --seconds N        the most a configuration may take (600)
    --run N            the rows are of start N, on another machine than the file's: those of new configurations say so,
                       and those the file has stand beside it under `again`, where they say how alike the machines are
    --show             run nothing; print README.md's tables and write the plot beside the file

A forward configuration runs in a process of its own and takes the place of its older row in the file, so a run may be
done in parts, on one machine. A configuration that fails is printed with its reason and leaves no row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from showing import MODELS, plot, table  # beside this file

HERE = Path(__file__).parent
BASE = "diffusers bf16 sdpa"  # what a diffusers user gets, and the truth that the others are compared with
CONFIGS = (
    BASE,
    "diffusers bf16 cudnn",
    "diffusers bf16 cudnn compiled",
    "diffusers bf16 fa3",
    "diffusers bf16 fa3 compiled",
    "diffusers fp8 cudnn layerwise",
    "diffusers fp8 fa3 layerwise",
    "torchao fp8 cudnn compiled",
    "torchao fp8 fa3 compiled",
    "te fp8 cudnn",
    "te fp8 fa3",
    "kitchen fp8 cudnn",
    "kitchen fp8 fa3",
    "ours bf16 fa3",
    "ours fp8 cudnn",
    "ours fp8 fa3 unfused",
    "ours fp8 fa3",
    "ours fp8 te fa3",
    "ours nvfp4 fa3",
    "ours fp8 fp8attn",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--run", type=int)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    if given.run is not None and given.linear:
        parser.error(
            "--run is for forwards: --linear's rows and ceilings are of one machine and would be replaced."
        )
    if not given.show:
        run(given)
    kept = load(given.file)
    print(table(kept["forward"], kept["again"]))
    given.file.with_suffix(".svg").write_text(plot(kept["forward"]))


def run(given: argparse.Namespace) -> None:
    for model in given.model or MODELS:
        for config in CONFIGS:
            if given.only and not any(set(only.split()) <= set(config.split()) for only in given.only):
                continue
            rows = called(
                "forward.py", given.seconds, "--model", model, "--config", config, "--runs", str(given.runs),
                "--truth", str(Path(tempfile.gettempdir()) / f"truth {model}.pt"), "--profile",
            )  # fmt: skip
            print(f"{model}: {config}", rows, flush=True)
            measured = [row for row in rows if "step_s" in row]
            keep(given.file, **of_start(given.run, measured, load(given.file)))
    if given.linear:
        rows = called("linear.py", given.seconds)
        print(*rows, sep="\n", flush=True)
        linears = [row for row in rows if "ms" in row]
        keep(given.file, linear=linears, ceilings=rows[0].get("ceilings", {}) if rows else {})


def called(script: str, seconds: int, *arguments: str) -> list[dict[str, Any]]:
    """The JSON objects a benchmark printed, up to where it failed."""
    command = [sys.executable, str(HERE / script), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, error = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, error = (late.stdout or b"").decode(), f"took more than {seconds} s"
    if error:
        print(*error.strip().splitlines()[-3:], sep="\n", flush=True)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def load(file: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"forward": [], "again": [], "linear": [], "ceilings": {}}
    return empty | (json.loads(file.read_text()) if file.exists() else {})


def of_start(
    run: int | None, rows: list[dict[str, Any]], kept: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Rows by the section they go to; a later start's to `again` where the file has them of another start."""
    if run is None:
        return {"forward": rows}
    of_another = {_name(row) for row in kept["forward"] if row.get("run") != run}
    marked = [row | {"run": run} for row in rows]
    return {
        "forward": [row for row in marked if _name(row) not in of_another],
        "again": [row for row in marked if _name(row) in of_another],
    }


def keep(file: Path, **sections: Any) -> None:
    """Put rows into the file in the place of older ones of the same configuration."""
    kept = load(file)
    for section, rows in sections.items():
        if section == "ceilings":
            kept[section] = rows
            continue
        names = {_name(row, section) for row in rows}
        kept[section] = [*(row for row in kept[section] if _name(row, section) not in names), *rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")


def _name(row: dict[str, Any], section: str = "forward") -> tuple[str, ...]:
    """What a section has one row of; `again` has one a start."""
    name = str(row.get("model", row.get("shape"))), str(row["config"])
    return (*name, str(row["run"])) if section == "again" else name


if __name__ == "__main__":
    main()
