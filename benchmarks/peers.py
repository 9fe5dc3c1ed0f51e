"""Linears of other libraries, made from an nn.Linear: what a user of theirs would write."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class KitchenLinear(nn.Module):
    """comfy-kitchen's FP8 layout: one scale a tensor, activations quantised in the call."""

    LAYOUT = "TensorCoreFP8Layout"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from comfy_kitchen.tensor import QuantizedTensor

        self.quantise = QuantizedTensor.from_float
        self.weight = nn.Parameter(self.quantise(linear.weight.data, self.LAYOUT), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.quantise(x.reshape(-1, x.shape[-1]), self.LAYOUT)
        return nn.functional.linear(rows, self.weight, self.bias).reshape(*x.shape[:-1], -1)


class TELinear(nn.Module):
    """Transformer Engine with current scaling: weights held in FP8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe

        self.te, self.recipe = te, recipe.Float8CurrentScaling()
        out, inp = linear.weight.shape
        with torch.no_grad(), te.fp8_model_init(enabled=True, recipe=self.recipe):
            self.inner: Any = te.Linear(
                inp, out, bias=True, params_dtype=torch.bfloat16, device=linear.weight.device
            )
            self.inner.weight.copy_(linear.weight)
            self.inner.bias.copy_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe):
            result: torch.Tensor = self.inner(x)
        return result


def kitchen_linear(linear: nn.Linear) -> nn.Module:
    """comfy-kitchen's."""
    return KitchenLinear(linear)


def te_linear(linear: nn.Linear) -> nn.Module:
    """Transformer Engine's."""
    return TELinear(linear)
