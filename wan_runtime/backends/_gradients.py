"""The gradient of products that torch cannot differentiate: those of quantised activations.

Their kernels give a tensor that nothing leads back from, so that whoever trains an adapter would lose, without a word,
all that flows through a layer.
"""

from __future__ import annotations

from typing import Any

import torch

from wan_runtime.backends import Multiply
from wan_runtime.formats import FORMATS, Slots


def wanted(*tensors: torch.Tensor) -> bool:
    """Whether a gradient is to flow back into any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def multiplied(
    multiply: Multiply, weight_format: str, rows: torch.Tensor, slots: Slots, static: torch.Tensor | None
) -> torch.Tensor:
    """What `multiply` gives, and the gradient of rows that a product with the dequantised weight has."""
    through: Any = _Straight.apply  # torch gives it no types
    product: torch.Tensor = through(rows, multiply, static, weight_format, tuple(slots), *slots.values())
    return product


class _Straight(torch.autograd.Function):
    """The quantisation of the activations counts as the identity; the weight has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, multiply: Multiply, static: torch.Tensor | None, weight_format: str,
        names: tuple[str, ...], *tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.weight_format, ctx.names, ctx.dtype = weight_format, names, rows.dtype
        ctx.save_for_backward(
            *tensors
        )  # the codes: dequantised, a model's weights would all wait for backward
        return multiply(rows, dict(zip(names, tensors, strict=True)), static)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slots = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = FORMATS[ctx.weight_format].dequantize(slots).to(gradients[0].dtype)
        return (gradients[0] @ weight).to(ctx.dtype), *(None for _ in range(4 + len(slots)))
