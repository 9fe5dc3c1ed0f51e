"""Training an adapter through a patched model on a GPU: its FP8 products and FlashAttention 3 have no derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from tests.gpu.test_fused_gpu import BF16, model, on_gpu
from tests.hosts.diffusers import error, inputs
from tests.hosts.training import add_lora, gradients, joined

pytestmark = pytest.mark.gpu

TARGETS = ("to_q", "to_v", "net.2")


def of_adapters(made: Any) -> dict[str, torch.Tensor]:
    """The gradients of a LoRA on every block's attention and feed-forward."""
    add_lora(made, TARGETS)
    return gradients(made, on_gpu(inputs(BF16)))


@pytest.mark.parametrize("attention", ["auto", "fp8"])
@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_gradients_are_those_of_the_dequantised_model(weights: str, attention: str) -> None:
    expected = of_adapters(model(weights=weights, compute="bf16", attention="sdpa"))
    found = of_adapters(model(weights=weights, attention=attention))
    assert found.keys() == expected.keys() and len(found) == 6 * 2 * 5
    for part in TARGETS:
        assert error(joined(found, part), joined(expected, part)) < 0.15
