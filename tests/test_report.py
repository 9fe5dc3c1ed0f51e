"""The report says what was done, with the numbers of the model it is about."""

from __future__ import annotations

import dataclasses
import json

import pytest

import wan_runtime
from tests.hosts.diffusers import transformer
from wan_runtime.plan import Decision
from wan_runtime.report import Report


def report(**changes: object) -> Report:
    decisions = (
        Decision("", "", "model", "the host model"),
        Decision("a", "x", "quantised", "weights=auto", "fp8", "bf16", "torch"),
        Decision("b", "y", "quantised", "weights=auto", "fp8", "bf16", "torch"),
        Decision("c", "z", "linear", "skipped by '[abc]*'"),
        Decision("d", "w", "resident", "stays fp32 by the host's rule"),
    )
    base = Report("wan_diffusers", "cpu", "bfloat16", decisions, 3 * 2**30, 5 * 2**20)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")
    ]


def test_table_counts_like_layers() -> None:
    assert rows(str(report())) == [
        ["1", "fp32", "fp32", "host", "the host model"],
        ["2", "fp8", "bf16", "torch", "weights=auto"],
        ["1", "compute dtype, fp32 bias", "compute dtype", "host", "skipped by '[abc]*'"],
        ["1", "fp32", "fp32", "host", "stays fp32 by the host's rule"],
    ]


def test_table_tells_file_sizes_and_notes() -> None:
    text = str(report(checkpoint="m.safetensors", dialect="comfy", evidence="a marker", variant="T2V-14B",
                      notes=("No GPU [here].",)))  # fmt: skip
    for said in (
        "T2V-14B",
        "m.safetensors: comfy, a marker",
        "3.00 GiB -> 5.0 MiB",
        "bfloat16",
        "No GPU [here].",
    ):
        assert said in text
    assert "nothing was done" not in text
    assert "nothing was done" in str(report(already=True))


def test_json_round_trip() -> None:
    made = report(notes=("a note",))
    data = json.loads(made.to_json())
    assert data["bytes_before"] == 3 * 2**30 and data["notes"] == ["a note"]
    assert data["decisions"][1] == dataclasses.asdict(made.decisions[1])
    assert [d["path"] for d in data["decisions"] if d["action"] == "quantised"] == ["a", "b"]


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_a_real_report_adds_up(weights: str) -> None:
    model = transformer()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    made = wan_runtime.patch(model, weights=weights)
    assert made.bytes_before == before
    assert made.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    assert len(made.decisions) == sum(int(row[0]) for row in rows(str(made)) if row[0])
    assert len(made.quantised) == 20
