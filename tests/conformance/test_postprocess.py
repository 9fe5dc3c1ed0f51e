"""Model Optimizer's ComfyUI post-process: with each of its options, an export means what the plain one means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance.produce_postprocess import EXPORTS
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.corrections import effective_weight

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.produce_postprocess", str(folder)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_means_the_same(exported: Path, name: str) -> None:
    expected = load_file(exported / "expected.safetensors")
    checkpoint = open_checkpoint(exported / name)
    assert checkpoint.dialect.name == ("modelopt_comfy" if "swizzled" in name else "modelopt")
    modules = {path: layer.module for path, layer in checkpoint.layers.items()}
    assert set(modules.values()) == expected.keys() and len(expected) == 20
    read = {item.path: item for item in stream(checkpoint, torch.device("cpu")) if item.format is not None}
    for path, module in modules.items():
        weight = effective_weight(read[path].format or "", read[path].slots)
        torch.testing.assert_close(weight, expected[module], rtol=2**-22, atol=0)


def test_the_post_process_leaves_its_mark(exported: Path) -> None:
    """What identify goes by: the header's quantization_config with any option, and without one none."""
    for name in EXPORTS:
        checkpoint = open_checkpoint(exported / name)
        assert ("quantization_config" in checkpoint.header.metadata) == (name != "untouched")
        assert ("_quantization_metadata" in checkpoint.header.metadata) == ("metadata" in name)
