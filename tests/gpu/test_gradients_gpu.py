"""Training an adapter through a patched model on a GPU: its FP8 products and FlashAttention 3 have no derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig

from tests.gpu.test_fused_gpu import BF16, model
from tests.hosts.diffusers import error, inputs

pytestmark = pytest.mark.gpu


def of_adapters(made: Any) -> dict[str, torch.Tensor]:
    """The gradients of a LoRA on every block's attention and feed-forward."""
    torch.manual_seed(1)
    made.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
    arguments = inputs(BF16)
    made(**{name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()})[
        0
    ].float().square().sum().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("attention", ["auto", "fp8"])
@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_gradients_are_those_of_the_dequantised_model(weights: str, attention: str) -> None:
    expected = of_adapters(model(weights=weights, compute="bf16", attention="sdpa"))
    found = of_adapters(model(weights=weights, attention=attention))
    assert found.keys() == expected.keys() and len(found) == 6 * 2 * 5
    for part in ("to_q", "to_v", "net.2"):
        names = [name for name in found if part in name]
        both = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected))
        assert error(*both) < 0.15
