"""What loading costs in memory, and where a model on meta goes; `benchmarks/loading.py` on a small file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.wan import block_linears, state
from tests.conftest import ROOT
from tests.test_api import transformer_on_meta
from wan_runtime.linear import quantised_layers


def alone(*arguments: str) -> str:
    """What a Python of its own prints."""
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.long
def test_the_benchmark_measures_and_a_load_takes_no_memory_for_the_weights(tmp_path: Path) -> None:
    """On the CPU, in a process of its own: less than half the file is the host's own memory at the peak (its fp32
    residents are a sixth), though every weight was checked."""
    figures = tmp_path / "figures.json"
    script = [
        "benchmarks/loading.py",
        str(tmp_path),
        "--gib",
        "0.1",
        "--device",
        "cpu",
        "--json",
        str(figures),
    ]
    printed = alone(*script)
    found = json.loads(figures.read_text())
    assert json.loads(printed.splitlines()[-1]) == found
    assert list(tmp_path.iterdir()) == [figures], "the benchmark left files behind"
    assert 0.05 < found["file_gb"] < 0.2
    seen = {(row["what"], row["cache"]) for row in found["rows"]}
    for what in ("read by threads", "ours, load", "safetensors load_file"):
        assert {(what, "cold"), (what, "warm")} <= seen
    for row in found["rows"]:
        ceiling = found["ceiling_gb_s"][row["cache"]]
        assert row["of_ceiling"] == pytest.approx(found["file_gb"] / row["s"] / ceiling)
        assert f"| {row['what']} | {row['cache']} | {row['s']:.2f} |" in printed
    assert max(row["of_ceiling"] for row in found["rows"] if row["what"].startswith("read")) == 1
    assert found["memory"]["host_anonymous_gib"] < 0.5 * found["file_gb"] * 1e9 / 2**30


@pytest.mark.parametrize("default", [None, "cpu", "meta"])
def test_a_model_on_meta_gets_the_mapped_file_s_own_pages_on_the_cpu(
    tmp_path: Path, default: str | None
) -> None:
    path = files.comfy_scaled_fp8(state(), block_linears(), "fp8").write(tmp_path)
    model = transformer_on_meta()
    with nullcontext() if default is None else torch.device(default):
        wan_runtime.patch(model, path)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines if str(path) in line
    ]
    payloads = [layer.get_parameter("payload") for _, layer in quantised_layers(model)]
    assert len(payloads) == 20
    assert all(any(payload.data_ptr() in run for run in mapped) for payload in payloads)


PATCH = """
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
import torch
from loading import memory
from random_file import make, sizes_for
path = Path(sys.argv[1]) / "large.safetensors"
make(path, sizes_for(2.5))
print(memory(path, torch.device("cpu"), sizes_for(2.5))["host_anonymous_gib"], path.stat().st_size / 2**30)
"""


@pytest.mark.long
def test_a_patch_in_14b_s_widths_takes_its_fp32_residents_and_little_more(tmp_path: Path) -> None:
    """0.87 GiB of fp32 residents, and no heap that grows with the file; the first patch of its process."""
    printed = alone("-c", PATCH, str(tmp_path))
    peak, size = map(float, printed.split())
    assert size > 2.3 and peak < 1.8
