"""Every scheme of comfy-kitchen and convert_to_quant means to us what it means to them.

produce_comfy.py runs the producers in a process of its own; the expected values are their own dequantisation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_runtime
from tests.conformance.produce_comfy import PRODUCERS
from wan_runtime.checkpoint import open_checkpoint, read_layer, stream
from wan_runtime.corrections import effective_weight
from wan_runtime.linear import quantised_layers
from wan_runtime.names import SPELLINGS, from_original

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def produced(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("comfy")
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.produce_comfy", str(folder), *PRODUCERS],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return folder


def _close(weight: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within fp32 rounding: of the product, or of a rotation's sums, whose terms are of the row's size."""
    assert weight.shape == wanted.shape
    off = (weight - wanted).abs()
    assert bool((off <= 2**-20 * wanted.abs().amax(dim=1, keepdim=True)).all()), off.max()


@pytest.mark.parametrize("name", PRODUCERS)
def test_every_layer_is_what_the_producer_dequantises(produced: Path, name: str) -> None:
    expected = load_file(f"{produced / name}.expected.safetensors")
    checkpoint = open_checkpoint(produced / name / "model.safetensors")
    assert checkpoint.dialect.name == "comfy"
    assert checkpoint.layers.keys() == expected.keys() and len(expected) >= 18
    streamed = {item.path: item.slots for item in stream(checkpoint, torch.device("cpu"))}
    for path, wanted in expected.items():
        layer = checkpoint.layers[path]
        assert layer.format == PRODUCERS[name][0]
        for slots in (read_layer(checkpoint, path), streamed[path]):
            assert ("rotation" in slots) == ("rotated" in name or "w4a" in name or "w6a" in name)
            _close(effective_weight(layer.format, slots), wanted)


LOADED = (
    "kitchen-int8-rotated",
    "kitchen-w4a4",
    "kitchen-w4a8-asymmetric",
    "kitchen-awq",
    "tool-mxfp8-hybrid",
)


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_layer_multiplies_by_it(produced: Path, name: str) -> None:
    """Through `load`, in fp32: every layer's own product against the producer's weight."""
    expected = load_file(f"{produced / name}.expected.safetensors")
    model = wan_runtime.load(
        produced / name / "model.safetensors", host="diffusers", dtype=torch.float32, device="cpu"
    )
    layers = dict(quantised_layers(model))
    assert len(layers) == len(expected)
    generator = torch.Generator().manual_seed(0)
    for path, wanted in expected.items():
        layer = layers[from_original(SPELLINGS["diffusers"], path)]
        x = torch.randn(3, wanted.shape[1], generator=generator)
        truth = torch.nn.functional.linear(x.double(), wanted.double())
        if layer.bias is not None:
            truth += layer.bias.double()
        assert ((layer(x).double() - truth).norm() / truth.norm()).item() < 1e-5
