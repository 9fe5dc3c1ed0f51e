"""Products of bf16 activations with fp32 weights, on tensor cores.

An fp32 weight is the sum of three bf16 parts, 8 bits of its 24 each, and a bf16 activation times a part is exact in the
fp32 that tensor cores add in. So three bf16 products give what one in fp32 does, and need no fp32 copy of the
activations.
"""

from __future__ import annotations

import torch
from torch import nn

ROWS = 1024  # below them a product is over before its parts are made
NARROW = 4  # a weight with this many times fewer outputs than inputs: three products of it in fp32 take little memory
ALIGNED = 8  # bf16 values in the 16 bytes that a row of a fast product is a multiple of


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows [..., in] times weight [out, in] fp32, plus bias [out] fp32, in the dtype of the rows: as in fp32, rounded
    once."""
    outputs, inputs = weight.shape
    if _splittable(rows) and (inputs < outputs or NARROW * outputs <= inputs):
        multiplied = _beside if inputs < outputs else _below
        return multiplied(rows.flatten(0, -2), weight, bias).view(*rows.shape[:-1], outputs)
    return nn.functional.linear(rows.float(), weight, bias).to(rows.dtype)


def _splittable(rows: torch.Tensor) -> bool:
    """Whether three products take less time than one, and nothing (a gradient, a compiler) wants the one."""
    return (
        rows.is_cuda
        and torch.version.cuda is not None
        and rows.dtype is torch.bfloat16
        and rows.shape[:-1].numel() >= ROWS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _parts(values: torch.Tensor) -> list[torch.Tensor]:
    """Three bf16 tensors whose sum fp32 values are."""
    parts = []
    for _ in range(3):
        parts.append(values.to(torch.bfloat16))
        values = values - parts[-1]
    return parts


def _beside(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The parts side by side, for narrow rows: one product adds them up, and the bias with them."""
    width = 3 * weight.shape[1]
    padding = ALIGNED + -width % ALIGNED
    last = weight.new_zeros(len(weight), padding, dtype=torch.bfloat16)
    if bias is not None:
        last[:, :3] = torch.stack(_parts(bias), 1)
    parts = torch.cat((*_parts(weight), last), 1)
    made: torch.Tensor = torch.cat((rows, rows, rows, rows.new_ones(len(rows), padding)), 1) @ parts.t()
    return made


def _below(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The parts one below the other, for wide rows, which are read once: their products are few columns each."""
    products: torch.Tensor = torch.mm(rows, torch.cat(_parts(weight)).t(), out_dtype=torch.float32)
    total: torch.Tensor = products.unflatten(1, (3, -1)).sum(1)
    return (total if bias is None else total + bias).to(rows.dtype)
