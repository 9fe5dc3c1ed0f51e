"""Model Optimizer's SVDQuant and AWQ exports mean to us what its own layers compute (produce_svd.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_runtime
from tests.builders.wan import state
from tests.conformance.produce_svd import CONFIGS, RANK
from wan_runtime.checkpoint import open_checkpoint, read_layer
from wan_runtime.corrections import effective_weight
from wan_runtime.linear import quantised_layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def produced(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("svd")
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.produce_svd", str(folder), *CONFIGS],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_what_its_own_computes(produced: Path, name: str) -> None:
    expected = load_file(f"{produced / name}.expected.safetensors")
    checkpoint = open_checkpoint(produced / name)
    assert checkpoint.dialect.name == "modelopt"
    assert {layer.module for layer in checkpoint.layers.values()} == expected.keys() and len(expected) == 20
    originals = state()
    for path, layer in checkpoint.layers.items():
        slots = read_layer(checkpoint, path)
        branch = slots.get("low_rank_a")
        assert (branch is None) == (name == "modelopt-awq") and (branch is None or branch.shape[0] == RANK)
        weight, wanted = effective_weight(layer.format, slots), expected[layer.module]
        assert bool(((weight - wanted).abs() <= 2**-20 * wanted.abs().amax(dim=1, keepdim=True)).all())
        # and near the weight it was made from: the scales are not inverted, nor the branch taken off
        base = originals[f"{path}.weight"].float()
        assert (weight - base).norm() / base.norm() < 0.2


def test_a_loaded_layer_multiplies_by_it(produced: Path) -> None:
    expected = load_file(f"{produced / 'modelopt-svdquant'}.expected.safetensors")
    model = wan_runtime.load(
        produced / "modelopt-svdquant", host="diffusers", dtype=torch.float32, device="cpu"
    )
    layers = dict(quantised_layers(model))
    assert layers.keys() == expected.keys()
    generator = torch.Generator().manual_seed(0)
    for path, layer in layers.items():
        x = torch.randn(3, layer.in_features, generator=generator)
        assert layer.bias is not None
        truth = torch.nn.functional.linear(x.double(), expected[path].double(), layer.bias.double())
        assert ((layer(x).double() - truth).norm() / truth.norm()).item() < 1e-5
