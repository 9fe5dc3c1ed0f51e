"""The oracle: dequantise to fp32, multiply in fp32, on any device. Every other backend is measured against it."""

from __future__ import annotations

import torch

from wan_runtime.backends import Backend, Multiply
from wan_runtime.formats import FORMATS, Slots


def refuses(weight_format: str, compute: str, device: torch.device, shape: tuple[int, int]) -> str | None:
    return None if compute == "fp32" else f"it computes in fp32 only, not in {compute}"


def kernel(weight_format: str, compute: str) -> Multiply:
    dequantize = FORMATS[weight_format].dequantize

    def multiply(rows: torch.Tensor, slots: Slots, static: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(rows.float(), dequantize(slots))

    return multiply


BACKEND = Backend(
    name="reference",
    computes=lambda weight_format: ("fp32",),
    refuses=refuses,
    kernel=kernel,
)
