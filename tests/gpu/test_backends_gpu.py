"""The FP8 products on the GPU against fp64 arithmetic on the dequantised weights, at Wan's widths and odd sizes."""

from __future__ import annotations

import pytest
import torch

from wan_runtime.backends import _granularity
from wan_runtime.backends._granularity import PRODUCTS, Product, row_wise, tried
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear

pytestmark = pytest.mark.gpu

SHAPES = [(256, 256), (1536, 8960), (5120, 5120)]


def _layer(
    weight_format: str, out: int, inp: int, compute: str, *, static: float | None = None
) -> QuantLinear:
    weight = torch.randn(out, inp, device="cuda") * inp**-0.5
    slots = dict(FORMATS[weight_format].quantize(weight, True))
    if static is not None:
        slots["input_scale"] = torch.full((1, 1), static, device="cuda")
    bias = torch.randn(out, device="cuda")
    backend = "reference" if compute == "fp32" else "torch"
    return QuantLinear(
        inp,
        out,
        format=weight_format,
        slots=slots,
        bias=bias,
        backend=backend,
        compute=compute,
        planned_for="cuda",
        static=static is not None,
    )


def _error(layer: QuantLinear, x: torch.Tensor) -> float:
    assert layer.bias is not None
    weight = FORMATS[layer.format].dequantize(layer.slots).double()
    truth = x.double() @ weight.T + layer.bias.double()
    result = layer(x)
    assert result.dtype == x.dtype and result.shape == truth.shape
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_format", ["fp8", "nvfp4"])
def test_fp8_product_is_within_activation_rounding(weight_format: str, shape: tuple[int, int]) -> None:
    for tokens in (1, 17, 300):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        # e4m3 rounds an activation by up to 2**-4, about 2.6 % rms; NVFP4's expansion rounds the weight once more.
        assert _error(_layer(weight_format, *shape, "fp8"), x) < (0.035 if weight_format == "fp8" else 0.05)


@pytest.mark.parametrize("weight_format", ["fp8", "fp8_e5m2", "nvfp4"])
def test_dequantised_products_are_exact_to_their_dtype(weight_format: str) -> None:
    x = torch.randn(2, 5, 256, device="cuda", dtype=torch.bfloat16)
    assert _error(_layer(weight_format, 512, 256, "bf16"), x) < 6e-3
    assert _error(_layer(weight_format, 512, 256, "fp32"), x.float()) < 1e-5


def test_token_scales_hold_outliers_in_one_token() -> None:
    x = torch.randn(64, 1536, device="cuda", dtype=torch.bfloat16)
    x[7] *= 6e4  # one scale a tensor would flush every other token to zero
    layer = _layer("fp8", 1536, 1536, "fp8")
    quiet = torch.cat((x[:7], x[8:]))
    assert _error(layer, quiet) < 0.035


def test_static_input_scale_is_used_when_asked() -> None:
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    right = float(x.abs().max()) / 448
    assert _error(_layer("fp8", 256, 256, "fp8", static=right), x) < 0.035
    assert _error(_layer("fp8", 256, 256, "fp8", static=right / 100), x) > 0.3  # clips, as the file asked
    assert _error(_layer("nvfp4", 256, 256, "fp8", static=right / 6), x) < 0.05


def test_one_layer_serves_several_batches_and_streams() -> None:
    layer = _layer("nvfp4", 1536, 1536, "fp8")
    a, b = (torch.randn(n, 1536, device="cuda", dtype=torch.bfloat16) for n in (40, 9))
    alone = layer(a), layer(b)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = layer(b)
    torch.cuda.current_stream().wait_stream(side)
    assert (
        torch.equal(layer(a), alone[0]) and torch.equal(layer(b), alone[1]) and torch.equal(beside, alone[1])
    )


CUDA = torch.device("cuda", 0)


def on_the_default_stream(*operands: torch.Tensor | None) -> torch.Tensor:
    """What torch before 2.12 did on an sm_89 (pytorch#177651)."""
    with torch.cuda.stream(torch.cuda.default_stream()):
        return row_wise(*operands)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("product", "right"), [*((p, True) for p in PRODUCTS.values()), (on_the_default_stream, False)]
)
def test_the_probe_finds_a_product_that_runs_on_the_wrong_stream(product: Product, right: bool) -> None:
    refusal = tried(product, CUDA)
    assert refusal is None if right else refusal == "a test product was wrong by 1.00 (relative error)"


@pytest.mark.parametrize("weight_format", ["fp8", "nvfp4"])
def test_tensor_wise_products_are_as_accurate(weight_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 1536, device="cuda", dtype=torch.bfloat16)
    x[7] *= 6e4
    layer = _layer(weight_format, 256, 1536, "fp8")
    best = _error(layer, torch.cat((x[:7], x[8:])))
    monkeypatch.setitem(_granularity._REFUSED, 0, {"row-wise": "said so"})
    assert _error(layer, torch.cat((x[:7], x[8:]))) < 1.1 * best
    assert not bool(layer(x).isnan().any())
