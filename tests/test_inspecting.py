"""`inspect`: what it says of files of every dialect, of blocks that differ, and that it needs no torch to say it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import wan_runtime
from tests.builders import files, wan
from tests.reading import CASES, content
from wan_runtime import gpus, prospects
from wan_runtime.backends import backend_named
from wan_runtime.formats import FORMATS

INNER = sorted({name.split(".", 2)[2] for name in wan.block_linears()})


@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_every_dialect_is_described(tmp_path: Path, dialect: str, weight_format: str) -> None:
    wanted = content(dialect, weight_format)
    found = wan_runtime.inspect(wanted.write(tmp_path))
    assert found.dialect == dialect and found.evidence
    assert found.formats == ({weight_format: len(wanted.weights)} if wanted.weights else {})
    assert found.tensors == len(wanted.tensors) and found.high.keys() == (
        set() if wanted.weights else set(INNER)
    )
    assert found.runs.keys() == ({weight_format} if wanted.weights else {"unquantised"})
    assert "model" in str(found) and json.loads(found.to_json())["machine"] == found.machine


def test_what_stays_unquantised_is_named_by_block(tmp_path: Path) -> None:
    sizes = wan.Sizes(layers=5)
    some = [name for name in wan.block_linears(sizes) if name.split(".")[1] in "13" or name.endswith("ffn.0")]
    path = files.modelopt(wan.state(sizes), some, "fp8").write(tmp_path)
    found = wan_runtime.inspect(path)
    assert found.formats == {"fp8": len(some)}
    assert found.high == {name: "0, 2, 4" for name in INNER if name != "ffn.0"}
    assert "ffn.2, self_attn.k" in str(found) and "in blocks 0, 2, 4" in str(found)


def test_blocks_that_lack_something_are_noted_before_anything_is_loaded(tmp_path: Path) -> None:
    sizes = wan.Sizes(layers=4)
    state = wan.state(sizes)
    whole = wan_runtime.inspect(files.Content(state).write(tmp_path / "whole"))
    assert not any("missing" in note or "lack" in note for note in whole.odd)
    cut = {key: tensor for key, tensor in state.items() if key != "blocks.2.self_attn.q.bias"}
    [note] = [n for n in wan_runtime.inspect(files.Content(cut).write(tmp_path / "cut")).odd if "lack" in n]
    assert note.startswith("blocks 2 lack") and "blocks.2.self_attn.q.bias" in note
    gone = {key: tensor for key, tensor in state.items() if not key.startswith("blocks.1.")}
    [note] = [
        n for n in wan_runtime.inspect(files.Content(gone).write(tmp_path / "gone")).odd if "missing" in n
    ]
    assert note.startswith("blocks 1 are missing")


def test_the_command_reads_headers_without_importing_torch(tmp_path: Path) -> None:
    paths = [
        content(dialect, weight_format, "diffusers").write(tmp_path / dialect)
        for dialect, weight_format in (("plain", "none"), ("comfy", "nvfp4"), ("lightx2v", "fp8"))
    ]
    script = (
        "import sys; from wan_runtime.cli import app\n"
        "try: app(['inspect', '--json', *sys.argv[1:]])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = ('torch._C', 'numpy', 'diffusers', 'transformers', 'accelerate', 'safetensors', 'rich.table')\n"
        "print(*(name for name in heavy if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
    for fields, path in zip(json.loads(done.stdout), paths, strict=True):
        assert fields == json.loads(wan_runtime.inspect(path).to_json())


def test_what_needs_torch_gets_it(tmp_path: Path) -> None:
    path = content("quanto", "int8").write(
        tmp_path
    )  # its placeholders for input scales are tensors to be read
    script = "from wan_runtime.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", "--json", path], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)[0]["formats"] == {"int8": len(wan.block_linears())}


def test_prospects_are_what_the_backend_offers() -> None:
    offered = {name for name in FORMATS if "fp8" in backend_named("torch").computes(name)}
    assert set(prospects.FP8_PRODUCTS) == offered
    hopper = gpus.Driver((13, 0), (gpus.Gpu("NVIDIA H200", (9, 0), 141 * 2**30),))
    blackwell = gpus.Driver((13, 0), (gpus.Gpu("NVIDIA B200", (10, 0), 180 * 2**30),))
    as_it_is = {name for name in FORMATS if name in backend_named("torch").computes(name)} - {"fp8"}
    assert set(prospects.BLOCK_PRODUCTS) == as_it_is
    said = prospects.classes(FORMATS, blackwell)
    assert {name for name in FORMATS if said[name] == prospects.AS_IT_IS} == as_it_is
    assert said["fp8"] == prospects.FAST and said["int8"] == prospects.SLOW
    ampere = gpus.Driver((12, 8), (gpus.Gpu("NVIDIA A100", (8, 0), 80 * 2**30),))
    kinds = Counter(prospects.classes(FORMATS, hopper).values())
    assert kinds == {prospects.FAST: 2, prospects.EXPANDED: 1, prospects.SLOW: len(FORMATS) - 3}
    for driver in (ampere, None):
        assert set(prospects.classes(FORMATS, driver).values()) == {prospects.SLOW}
    assert prospects.machine(hopper) == "NVIDIA H200 (sm_90, 141.0 GiB)"
    assert "CPU" in prospects.machine(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answer of a machine without a driver")
def test_a_machine_without_a_driver_has_none() -> None:
    if not Path("/proc/driver/nvidia").exists():
        assert gpus.driver() is None
