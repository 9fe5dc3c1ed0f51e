"""Which FP8 scales a GPU's products take: both ways against fp64 arithmetic (torch multiplies FP8 codes on a CPU too),
and what a plan and a report say of a device that takes none."""

from __future__ import annotations

import pytest
import torch

from tests.hosts.diffusers import transformer
from wan_runtime import rules
from wan_runtime.backends import _granularity, torch_native
from wan_runtime.backends._granularity import PRODUCTS, product_on, remark, tensor_wise, tried
from wan_runtime.fitting import notes
from wan_runtime.formats import FORMATS
from wan_runtime.names import SPELLINGS
from wan_runtime.plan import Options, plan, tree_of

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    spread = torch.exp(2 * torch.randn(33, 1, generator=generator))  # tokens of very different sizes
    codes = torch.randn(33, 96, generator=generator).to(torch.float8_e4m3fn)
    weight = torch.randn(48, 96, generator=generator).to(torch.float8_e4m3fn)
    return codes, spread, weight, torch.rand(1, 48, generator=generator) * 0.1


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_against_fp64(name: str) -> None:
    codes, token_scale, weight, scale = operands()
    truth = (codes.double() * token_scale) @ (weight.double() * scale.T).T
    bias = torch.randn(48, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    for given in (None, bias):
        result = PRODUCTS[name](codes, token_scale, weight, scale, given)
        expected = truth if given is None else truth + given.double()
        assert result.dtype == torch.bfloat16
        each = (result.double() - expected).norm(dim=1) / expected.norm(dim=1)  # the smallest token's too
        assert float(each.max()) < 6e-3
    assert tried(PRODUCTS[name], CPU) is None


def test_the_backend_multiplies_the_way_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = FORMATS["fp8"].quantize(torch.randn(48, 96, generator=torch.Generator().manual_seed(1)), True)
    codes, token_scale, _, _ = operands()
    multiply = torch_native.coded("fp8", "fp8")
    assert multiply is not None
    first = multiply(codes, token_scale, slots)
    monkeypatch.setitem(_granularity._REFUSED, CPU.index, {"row-wise": "it reads what is not written"})
    assert product_on(CPU) is tensor_wise
    second = multiply(codes, token_scale, slots)
    assert not torch.equal(first, second)  # another rounding, so it was another product
    assert float((first.double() - second.double()).norm() / first.double().norm()) < 6e-3


def test_a_product_that_is_wrong_or_fails_is_refused_with_the_reason() -> None:
    def unwritten(codes: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        return PRODUCTS["row-wise"](torch.zeros_like(codes), *rest)  # type: ignore[arg-type]

    def unscaled(
        codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        return tensor_wise(codes, torch.ones_like(token_scale), weight, scale, bias)

    def failing(*_: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("only supported on another GPU\nand more")

    assert tried(unwritten, CPU) == "a test product was wrong by 1.00 (relative error)"
    assert str(tried(unscaled, CPU)).startswith("a test product was wrong by 0.")
    assert tried(failing, CPU) == "a test product failed: only supported on another GPU"


def test_the_report_says_how_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remark(GPU) is None and remark(CPU) is None
    monkeypatch.setitem(_granularity._REFUSED, 0, {"row-wise": "a test product was wrong by 1.00"})
    said = remark(GPU)
    assert said is not None and "tensor-wise" in said and "wrong by 1.00" in said
    assert _granularity.refuses(0) is None
    reasons = dict.fromkeys(PRODUCTS, "a test product failed: no FP8 here")
    monkeypatch.setitem(_granularity._REFUSED, 0, reasons)
    assert _granularity.refuses(0) == "a test product failed: no FP8 here" and remark(GPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU may have FP8 products")
@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_without_fp8_products_weights_stay_quantised_and_bf16_is_said_once(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_granularity, "_REFUSED", {})
    torch_native._probe.cache_clear()
    model = transformer()
    tree = tree_of(model, SPELLINGS["diffusers"])
    options = Options(weights=weights)
    decisions = plan(tree, None, GPU, options, swaps=rules.swaps, fp32=rules.fp32)
    quantised = [d for d in decisions if d.action == "quantised"]
    assert {(d.format, d.compute, d.backend) for d in quantised} == {(weights, "bf16", "torch")}
    assert all("torch fp8 refused: a test product failed" in d.reason for d in quantised)
    said = [note for note in notes(decisions, GPU, None, options) if "bf16" in note]
    assert said == [
        "On cuda:0 weights are stored quantised and multiplied in bf16; this saves memory, not time."
    ]
    torch_native._probe.cache_clear()
