"""The report of a conversion: which layers lost most, what is advised, and how both are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.builders import files, wan
from wan_runtime.cli import app
from wan_runtime.conversion import Sensitivity

LAYERS = wan.block_linears()


def rising(count: int, *outlying: float) -> Sensitivity:
    errors = [0.03 + 1e-5 * number for number in range(count)] + list(outlying)
    return Sensitivity(
        tuple(sorted(((f"layer.{n}", e) for n, e in enumerate(errors)), key=lambda item: -item[1]))
    )


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (rising(40), ()),  # alike to a few per cent
        (rising(38, 0.09, 0.05), ("layer.38", "layer.39")),
        (rising(36, 0.09, 0.08, 0.07, 0.06, 0.05), ("layer.36", "layer.37", "layer.38", "layer.39")),
        (Sensitivity(()), ()),
        (Sensitivity((("only", 0.5),)), ()),
        (Sensitivity(tuple((f"layer.{n}", 0.0) for n in range(20))), ()),
    ],
)
def test_the_layers_that_stand_out_are_suggested_and_never_more_than_a_tenth(
    found: Sensitivity, kept: tuple[str, ...]
) -> None:
    assert found.keep == kept
    assert all(f"--keep {path}" in " ".join(str(found).split()) for path in kept)
    assert json.loads(json.dumps(found.to_dict()))["keep"] == list(kept)


def test_sensitivity_prints_every_layer_and_its_advice_makes_the_file_better(tmp_path: Path) -> None:
    state = wan.state()
    for module in (
        "blocks.1.ffn.2",
        "blocks.0.self_attn.k",
    ):  # every weight but one halfway between two codes
        state[f"{module}.weight"] = torch.full_like(state[f"{module}.weight"], 17 / 4096)
        state[f"{module}.weight"][0, 0] = 448 / 4096
    source = files.Content({key: tensor.bfloat16() for key, tensor in state.items()}).write(tmp_path / "in")
    new = tmp_path / "new.safetensors"
    arguments = ["convert", str(source), str(new), "--to", "comfy-fp8", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*arguments, "--sensitivity"])
    assert shown.exit_code == 0, shown.output
    assert all(f" {module} " in shown.stdout for module in LAYERS)
    assert "--keep blocks.1.ffn.2" in shown.stdout and "--keep blocks.0.self_attn.k" in shown.stdout
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    listed = report["sensitivity"]["layers"]
    assert [one["error"] for one in listed] == sorted(report["errors"].values(), reverse=True)
    advised = [option for path in report["sensitivity"]["keep"] for option in ("--keep", path)]
    assert len(advised) == 4
    better = json.loads(CliRunner().invoke(app, [*arguments, *advised, "--json"]).stdout)
    assert max(better["errors"].values()) < max(report["errors"].values()) * 0.6
    assert len(better["errors"]) == len(LAYERS) - 2


def test_an_exact_conversion_has_no_layer_to_list(tmp_path: Path) -> None:
    source = files.comfy(wan.state(), LAYERS, "fp8").write(tmp_path / "in")
    arguments = [
        "convert",
        str(source),
        str(tmp_path / "new.safetensors"),
        "--to",
        "modelopt-fp8",
        "--sensitivity",
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "none lost anything" in shown.stdout
