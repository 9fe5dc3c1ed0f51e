"""Products with fp32 weights on tensor cores, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wan_runtime
from tests.hosts.diffusers import transformer
from wan_runtime.patches._patch_embedding import FusedPatches
from wan_runtime.residents import become, kind_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = {  # inputs and outputs
    "patch embedding": (64, 5120),
    "patch embedding, image-to-video": (144, 1536),
    "odd": (69, 130),
    "as many outputs": (1536, 1536),
    "head": (5120, 64),
    "head, TI2V-5B": (3072, 192),
}


@pytest.mark.parametrize("tokens", [8, 4096])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_resident_linear_is_one_rounding_from_fp64(shape: str, bias: bool, tokens: int) -> None:
    torch.manual_seed(0)
    inputs, outputs = SHAPES[shape]
    linear = nn.Linear(inputs, outputs, bias=bias, device="cuda")
    x = torch.randn(2, tokens, inputs, device="cuda", dtype=torch.bfloat16)
    truth = x.double() @ linear.weight.double().t()
    if bias:
        truth += linear.bias.double()
    sizes = x.double().abs() @ linear.weight.double().abs().t()  # what fp32 additions may lose is a share of
    become(linear, "resident")
    with torch.no_grad():
        made = linear(x)
    assert made.dtype is torch.bfloat16 and made.shape == truth.shape
    assert ((made.double() - truth).abs() <= truth.abs() * 2**-8 + sizes * 2**-21).all()


@pytest.mark.parametrize("shape", ["patch embedding", "head"])
def test_it_keeps_what_bf16_weights_lose(shape: str) -> None:
    torch.manual_seed(0)
    inputs, outputs = SHAPES[shape]
    linear = nn.Linear(inputs, outputs, device="cuda")
    x = torch.randn(4096, inputs, device="cuda", dtype=torch.bfloat16)
    truth = (x.double() @ linear.weight.double().t() + linear.bias.double()).detach()

    def error(made: torch.Tensor) -> float:
        return float((made.detach().double() - truth).norm() / truth.norm())

    become(linear, "resident")
    with torch.no_grad():
        ours = linear(x)
    rounded = nn.functional.linear(x, linear.weight.bfloat16(), linear.bias.bfloat16())
    assert error(ours) < 1.01 * error(truth.bfloat16()) < 0.8 * error(rounded)


def test_a_fused_patch_embedding_and_gradients() -> None:
    model = transformer(torch.bfloat16).to("cuda")
    wan_runtime.patch(model)
    conv, video = model.patch_embedding, torch.randn(1, 16, 5, 91, 90, device="cuda", dtype=torch.bfloat16)
    assert kind_of(conv) is FusedPatches
    truth = nn.functional.conv3d(
        video.double(), conv.weight.double(), conv.bias.double(), stride=conv.stride
    ).detach()
    with torch.no_grad():
        made = conv(video)
    assert ((made.double() - truth).abs() <= truth.abs() * 2**-8 + 1e-5).all()
    assert made.flatten(2).transpose(1, 2).is_contiguous()
    conv.requires_grad_()
    traced = conv(video)
    traced.float().sum().backward()
    torch.testing.assert_close(traced.detach(), made, rtol=2**-7, atol=1e-5)
    assert conv.weight.grad is not None and conv.weight.grad.isfinite().all()
