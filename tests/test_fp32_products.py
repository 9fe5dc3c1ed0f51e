"""An fp32 weight as three bf16 parts, on the CPU; tests/gpu/test_fp32_products_gpu.py has the products as they run."""

from __future__ import annotations

import torch
from torch import nn

from wan_runtime import fp32_products
from wan_runtime.residents import become


def test_three_parts_are_the_weight_to_its_last_bit() -> None:
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    parts = fp32_products._parts(weight)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(sum(part.double() for part in parts), weight.double())  # type: ignore[arg-type]


def test_parts_side_by_side_are_rounded_once_and_bring_the_bias() -> None:
    torch.manual_seed(0)
    for inputs in (64, 69):
        linear, rows = nn.Linear(inputs, 256), torch.randn(500, inputs, dtype=torch.bfloat16)
        truth = (rows.double() @ linear.weight.double().t() + linear.bias.double()).detach()
        with torch.no_grad():
            made = fp32_products._beside(rows, linear.weight, linear.bias)
        assert ((made.double() - truth).abs() <= truth.abs() * 2**-8 + 1e-5).all()


def test_a_resident_linear_on_a_cpu_is_fp32() -> None:
    torch.manual_seed(0)
    linear, rows = nn.Linear(64, 256), torch.randn(2, 600, 64, dtype=torch.bfloat16)
    wanted = nn.functional.linear(rows.float(), linear.weight, linear.bias).bfloat16()
    become(linear, "resident")
    with torch.no_grad():
        assert torch.equal(linear(rows), wanted)
