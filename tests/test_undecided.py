"""What `inspect` shows of a file that it refuses, as nobody can say how it is to be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner, Result

import wan_runtime
from tests.builders import files, seed, wan
from wan_runtime.cli import app
from wan_runtime.dialects import DIALECTS
from wan_runtime.errors import AmbiguousDialect

LINEARS = wan.block_linears()


@pytest.fixture
def undecided(tmp_path: Path) -> Path:
    return seed.broken_nvfp4(wan.state(), LINEARS).write(tmp_path, "undecided.safetensors")


def inspect(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert isinstance(result.exception, SystemExit), result.exception
    return result


def test_an_ambiguous_file_is_shown_with_what_every_claim_would_mean(undecided: Path) -> None:
    shown = inspect(undecided)
    words = " ".join(shown.stdout.replace("│", " ").split())
    assert shown.exit_code == 1
    assert "unlisted WAN variant (dim 128, 2 layers" in words and "undecided: 2 dialects fit" in words
    for name in ("comfy", "modelopt"):
        assert f"if {name} {DIALECTS[name].meaning} quantised layers 20 x nvfp4" in words
    assert "block Linears' .weight 20 x U8 block Linears' .weight_scale 20 x F8_E4M3" in words
    assert "against it the layout test says in another order" in words  # of comfy's reading
    assert "as was asked" not in words  # nobody named a dialect
    with pytest.raises(AmbiguousDialect) as refused:
        wan_runtime.inspect(undecided)
    assert shown.stderr == f"wan-runtime: {refused.value}\n"


def test_every_tensor_of_the_file_is_counted_once(undecided: Path) -> None:
    [found] = json.loads(inspect(undecided, "--json").stdout)
    counted: Counter[str] = Counter()
    for dtypes in found["kinds"].values():
        counted.update(dtypes)
    with safe_open(undecided, "pt") as file:
        held = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
    assert counted == held and found["tensors"] == held.total()


def test_a_claim_that_cannot_be_read_says_why_and_the_others_are_shown(tmp_path: Path) -> None:
    content = seed.broken_nvfp4(wan.state(), LINEARS)
    del content.tensors[f"{LINEARS[0]}.weight_scale_2"]
    [found] = json.loads(inspect(content.write(tmp_path), "--json").stdout)
    assert found["variant"] is None and found["kinds"]["block Linears' .weight"] == {"U8": 20}
    assert all(LINEARS[0] in claim["against"] for claim in found["claims"].values())


def test_a_file_that_no_dialect_fits_is_shown_too(tmp_path: Path) -> None:
    tensors = wan.state()
    for module in LINEARS:
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale_inv"] = torch.ones(1, 1)
    shown = inspect(files.Content(tensors).write(tmp_path))
    words = " ".join(shown.stdout.replace("│", " ").split())
    assert (shown.exit_code, "undecided: no dialect fits" in words) == (1, True)
    assert "block Linears' .weight_scale_inv 20 x F32" in words
    assert "no known dialect fits this file" in shown.stderr


def test_a_file_of_a_tool_that_is_not_read_is_shown_with_the_tool_s_name(tmp_path: Path) -> None:
    tensors = wan.state()
    for module in LINEARS:
        tensors[f"{module}.weight"] = torch.zeros(128, 128, dtype=torch.int8)
        tensors[f"{module}.SCB"] = torch.ones(128)
    shown = inspect(files.Content(tensors).write(tmp_path))
    words = " ".join(shown.stdout.replace("│", " ").split())
    assert (shown.exit_code, "undecided" in words) == (1, False)
    assert "written by bitsandbytes" in words and "block Linears' .SCB 20 x F32" in words
    assert "this is a file of bitsandbytes" in shown.stderr


def test_what_is_no_transformer_is_refused_alone(tmp_path: Path) -> None:
    shown = inspect(tmp_path / "gone.safetensors")
    assert (shown.exit_code, shown.stdout) == (1, "")
