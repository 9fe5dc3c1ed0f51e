"""The gradient of products that torch cannot differentiate: those of quantised activations.

Their kernels give a tensor that nothing leads back from, so that whoever trains an adapter would lose, without a word,
all that flows through a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wan_runtime.backends import Multiply
from wan_runtime.formats import Slots


def multiplied(
    multiply: Multiply,
    dequantize: Callable[[Slots], torch.Tensor],
    rows: torch.Tensor,
    slots: Slots,
    static: torch.Tensor | None,
) -> torch.Tensor:
    """What `multiply` gives, and the gradient of rows that a product with the dequantised weight has."""
    through: Any = _Straight.apply  # torch gives it no types
    product: torch.Tensor = through(rows, multiply, dequantize, static, tuple(slots), *slots.values())
    return product


class _Straight(torch.autograd.Function):
    """The quantisation of the activations counts as the identity; the weight has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, multiply: Multiply, dequantize: Callable[[Slots], torch.Tensor],
        static: torch.Tensor | None, names: tuple[str, ...], *tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.dequantize, ctx.names, ctx.dtype = dequantize, names, rows.dtype
        # The codes: dequantised, a model's weights would all wait for backward.
        ctx.save_for_backward(*tensors)
        return multiply(rows, dict(zip(names, tensors, strict=True)), static)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slots = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = ctx.dequantize(slots).to(gradients[0].dtype)
        return (gradients[0] @ weight).to(ctx.dtype), *(None for _ in range(4 + len(slots)))
