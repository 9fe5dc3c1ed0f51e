"""Training through a patched model: what cannot be differentiated hands its gradient on, or is left to what can."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests.hosts.diffusers import error, inputs
from tests.hosts.training import add_lora, gradients, joined
from tests.test_fused_block import coded, patched
from wan_runtime.attention import ATTENTIONS
from wan_runtime.kernels import quantize_rows
from wan_runtime.linear import QuantLinear
from wan_runtime.patches._attention_processor import Processor


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's twin, from which nothing leads back either."""
    twin = torch.no_grad()(quantize_rows.quantize_rows_torch)
    monkeypatch.setattr(quantize_rows, "quantize_rows", twin)


def test_gradients_flow_through_products_of_codes() -> None:
    model = patched()
    found = []
    for each in (model, coded(copy.deepcopy(model))):
        add_lora(each, ("to_q", "net.2"))
        found.append(joined(gradients(each, inputs())))
    assert error(found[1], found[0]) < 0.06


@pytest.mark.parametrize("bias", [0.5, 0.1])
def test_a_layer_s_gradient_is_that_of_its_dequantised_weight(bias: float) -> None:
    layer = next(m for m in coded(patched()).modules() if isinstance(m, QuantLinear))
    assert layer.bias is not None
    layer.bias.fill_(bias)  # 0.5 is a bf16 number, which a product adds itself
    layer._short_bias = None
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        x.requires_grad_()
        result = layer(x)
        with torch.no_grad():
            assert error(result, layer(x)) < 1e-2
        upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        result.backward(upstream)
        assert x.grad is not None and x.grad.dtype == dtype
        assert error(x.grad, upstream.double() @ layer.weight.double()) < 1e-2


# torch's compiler makes an instance of the function itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_has_the_same_gradient() -> None:
    layer = next(m for m in coded(patched()).modules() if isinstance(m, QuantLinear))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected)


@pytest.mark.parametrize("name", ["fa3", "fp8"])
def test_attention_without_a_gradient_is_not_given_one_to_make(name: str) -> None:
    """The wheel of FlashAttention 3 has no backward pass, and codes have no gradient."""
    q, k, v = torch.randn(3, 1, 1030, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = ATTENTIONS["sdpa"].attend(q, k, v)
    for wanted in (q, k, v):
        wanted.requires_grad_()
        result = Processor(name, ("cpu", torch.float32), None).attend(q, k, v)
        assert torch.equal(result, expected)
        result.sum().backward()
        assert wanted.grad is not None
        wanted.requires_grad_(False)
