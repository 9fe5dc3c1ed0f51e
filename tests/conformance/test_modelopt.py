"""What Model Optimizer exports with each of its algorithms means to us what it means to its own tensor classes.

produce_modelopt.py calibrates and exports on the CPU, in a process of its own; FP8 and NVFP4 are in test_producers.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conformance.produce_modelopt import CONFIGS
from wan_runtime.checkpoint import open_checkpoint, read_layer
from wan_runtime.corrections import effective_weight
from wan_runtime.errors import BadTensor, CheckpointError

pytestmark = pytest.mark.slow
FORMATS = {
    "fp8-per-channel": {"fp8"},
    "fp8-blocks": {"fp8", "fp8_block"},  # a layer of one block is exported with one scale
    "int8": {"int8"},
    "int8-weight-only": {"int8"},
    "int8-smoothed": {"int8"},
    "mxfp8": {"mxfp8"},
    "mxfp4": {"mxfp4"},
    "w4a8": {"nvfp4"},
    "w4a16": {"nvfp4"},
    "mixed": {"mxfp8", "nvfp4", "int8"},
}


@pytest.fixture(scope="module")
def produced(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("modelopt")
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.produce_modelopt", str(folder)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_what_model_optimizer_dequantises(produced: Path, name: str) -> None:
    expected = load_file(f"{produced / name}.expected.safetensors")
    checkpoint = open_checkpoint(produced / name)
    assert checkpoint.dialect.name == "modelopt"
    assert {layer.format for layer in checkpoint.layers.values()} == FORMATS[name]
    modules = {layer.module: path for path, layer in checkpoint.layers.items()}
    assert modules.keys() == expected.keys() and len(modules) == 20
    for module, weight in expected.items():
        slots = read_layer(checkpoint, modules[module])
        read = effective_weight(checkpoint.layers[modules[module]].format, slots)
        torch.testing.assert_close(read, weight, rtol=2**-21, atol=0)


def test_the_activations_of_w4a8_are_fp8(produced: Path) -> None:
    """Their scale is amax / 448; ours of NVFP4 is amax / 2688, so that a product can be told either."""
    checkpoint = open_checkpoint(produced / "w4a8")
    written = load_file(produced / "w4a8" / "diffusion_pytorch_model.safetensors")
    for path, layer in checkpoint.layers.items():
        amax = 448 * written[f"{layer.module}.input_scale"].item()
        assert read_layer(checkpoint, path)["input_scale"].item() * 2688 == pytest.approx(amax, rel=1e-6)


def _moved(produced: Path, name: str, tmp_path: Path, algorithm: str | None) -> Path:
    """The same weights with another word in config.json, or without one."""
    source = produced / name
    (tmp_path / "model.safetensors").write_bytes(
        (source / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    if algorithm is not None:
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"]["quant_algo"] = algorithm
        (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("name", "algorithm"), [("mxfp8", "FP8"), ("mxfp4", "NVFP4"), ("mixed", "FP8")])
def test_an_algorithm_that_does_not_fit_the_bytes_is_refused(
    produced: Path, tmp_path: Path, name: str, algorithm: str
) -> None:
    with pytest.raises(BadTensor, match=f"config.json says {algorithm}"):
        open_checkpoint(_moved(produced, name, tmp_path, algorithm))


def test_blocks_of_32_without_their_algorithm_are_refused(produced: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_moved(produced, "w4a8", tmp_path, "NVFP4"))
    with pytest.raises(BadTensor, match="plain block scales"):
        read_layer(checkpoint, next(iter(checkpoint.layers)))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_mx_without_a_config_is_undecided_until_named(produced: Path, tmp_path: Path, name: str) -> None:
    """Nothing else says whether its block scales are in plain order."""
    path = _moved(produced, name, tmp_path, None)
    with pytest.raises(CheckpointError, match="--dialect"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, dialect="modelopt")
    assert {layer.format for layer in checkpoint.layers.values()} == FORMATS[name]


def test_int4_is_refused_by_name(produced: Path, tmp_path: Path) -> None:
    """AWQ packs along the output channels; the shapes are those of an export with INT4_AWQ_CFG."""
    path = _moved(produced, "w4a16", tmp_path, "W4A16_AWQ")
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".weight_scale_2")]:
        module = key.removesuffix(".weight_scale_2")
        del tensors[key]
        tensors[f"{module}.weight_scale"] = torch.ones(tensors[f"{module}.weight"].shape[0], 1)
    save_file(tensors, path)
    with pytest.raises(BadTensor, match=r"INT4 \(W4A16_AWQ\), which is not read"):
        open_checkpoint(path)
