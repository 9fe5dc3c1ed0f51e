"""Files of compressed-tensors, optimum-quanto and torchao mean to us what they mean to the libraries that wrote them.

Each library quantises and writes a tiny WAN model with its own code (produce_libraries.py, a process a library), and
the expected weights are its own dequantisation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance.produce_libraries import GROUPS
from wan_runtime.checkpoint import open_checkpoint, read_layer, stream
from wan_runtime.corrections import effective_weight
from wan_runtime.errors import BadTensor, CheckpointError, UnreadDialect

pytestmark = pytest.mark.slow
# The format of every layer but those whose block is all of a small layer.
FORMATS = {
    ("compressed-tensors", "nvfp4"): "nvfp4",
    ("compressed-tensors", "mxfp4"): "mxfp4",
    ("compressed-tensors", "mxfp8"): "mxfp8",
    ("compressed-tensors", "fp8"): "fp8",
    ("compressed-tensors", "fp8-row"): "fp8",
    ("compressed-tensors", "fp8-block"): "fp8_block",
    ("compressed-tensors", "int8"): "int8",
    ("compressed-tensors", "int8-packed"): "int8_block",
    ("compressed-tensors", "int4"): "int4",
    ("compressed-tensors", "int4-asymmetric"): "int4",
    ("quanto", "int8"): "int8",
    ("quanto", "int8-fp32-sidecar"): "int8",
    ("quanto", "fp8"): "fp8",
    ("quanto", "fp8-e5m2"): "fp8_e5m2",
    ("torchao", "fp8-tensor"): "fp8",
    ("torchao", "fp8-row"): "fp8",
    ("torchao", "fp8-block"): "fp8_block",
    ("torchao", "fp8-e5m2"): "fp8_e5m2",
    ("torchao", "int8-tensor"): "int8",
    ("torchao", "int8-row"): "int8",
    ("torchao", "int8-group"): "int8_block",
    ("torchao", "nvfp4"): "nvfp4",
    ("torchao", "nvfp4-swizzled"): "nvfp4",
    ("torchao", "nvfp4-one-level"): "nvfp4",
    ("torchao", "mxfp8"): "mxfp8",
    ("torchao", "mxfp8-swizzled"): "mxfp8",
    ("torchao", "mxfp6"): "mxfp6",
    ("torchao", "mxfp4-swizzled"): "mxfp4",
}
# What the libraries write and no format here holds: the error and words of it.
REFUSED: dict[tuple[str, str], tuple[type[CheckpointError], str]] = {
    ("compressed-tensors", "mxfp6"): (BadTensor, "MXFP6 is E2M3"),
    ("quanto", "int4"): (UnreadDialect, "qint4 or qint2"),
    ("torchao", "mxfp6-e2m3"): (BadTensor, "MXTensor of fp6_e2m3"),
    ("torchao", "mxfp8-e5m2"): (BadTensor, "MXTensor of float8_e5m2"),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with every library's files and expected weights."""
    folder = tmp_path_factory.mktemp("libraries")
    for group in GROUPS:
        command = [sys.executable, "-m", "tests.conformance.produce_libraries", str(folder), group]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_file_that_is_written_is_tested() -> None:
    made = {(group, name) for group, files in GROUPS.items() for name in files}
    assert made == FORMATS.keys() | REFUSED.keys()


@pytest.mark.parametrize(("group", "name"), FORMATS)
def test_every_layer_is_what_the_library_dequantises(written: Path, group: str, name: str) -> None:
    expected = load_file(f"{written / group / name}.expected.safetensors")
    checkpoint = open_checkpoint(written / group / name)
    assert checkpoint.dialect.name == group.replace("-", "_")
    assert len(checkpoint.layers) == len(expected) == 20
    kinds, kind = {layer.format for layer in checkpoint.layers.values()}, FORMATS[group, name]
    assert kind in kinds and kinds <= {kind, kind.removesuffix("_block")}
    streamed = {item.path: item for item in stream(checkpoint, torch.device("cpu"))}
    for path, layer in checkpoint.layers.items():
        truth = expected[layer.module]
        # An asymmetric layer's two terms cancel, which takes from the digits of both sides.
        slack = 2**-22 * float(truth.abs().max()) if name.endswith("asymmetric") else 0
        for slots in (read_layer(checkpoint, path), streamed[path].slots):
            torch.testing.assert_close(effective_weight(layer.format, slots), truth, rtol=2**-22, atol=slack)


@pytest.mark.parametrize(("group", "name"), REFUSED)
def test_what_no_format_holds_is_refused_by_name(written: Path, group: str, name: str) -> None:
    kind, words = REFUSED[group, name]
    with pytest.raises(kind, match=words):
        open_checkpoint(written / group / name)


@pytest.mark.parametrize(("name", "value"), [("nvfp4", 1 / 700), ("fp8", 0.125)])
def test_a_calibrated_input_scale_multiplies(written: Path, name: str, value: float) -> None:
    """compressed-tensors writes NVFP4's as its reciprocal; produce_libraries.py calibrates with 700 and 0.125."""
    checkpoint = open_checkpoint(written / "compressed-tensors" / name)
    for path in checkpoint.layers:
        assert read_layer(checkpoint, path)["input_scale"].item() == pytest.approx(value, rel=1e-6)


def test_quanto_s_placeholders_are_no_input_scales(written: Path) -> None:
    checkpoint = open_checkpoint(written / "quanto" / "int8")
    assert all("input_scale" not in read_layer(checkpoint, path) for path in checkpoint.layers)
    assert {key.rpartition(".")[2] for key in checkpoint.markers} == {"input_scale", "output_scale"}
