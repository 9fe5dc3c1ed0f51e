"""On a GPU: the block quantisers, which run wherever FP8 does; what the probe says; and on Blackwell the products."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.support import KINDS, cell, word
from wan_runtime.backends import BACKENDS, _block_scaled, backend_named, torch_native
from wan_runtime.doctor import examine
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.kernels.quantize_mxfp8 import quantize_mxfp8, quantize_mxfp8_torch
from wan_runtime.kernels.quantize_nvfp4 import quantize_nvfp4, quantize_nvfp4_torch
from wan_runtime.plan import Options, choose

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
COMPUTES = tuple(_block_scaled.COMPUTES)
GENERATIONS = {
    (8, 9): "Ada (sm_89)",
    (9, 0): "Hopper (sm_90)",
    (10, 0): "Blackwell (sm_100)",
    (12, 0): "Blackwell (sm_120)",
}


@pytest.mark.parametrize(("tokens", "width"), [(33, 96), (1031, 1536), (4097, 5120), (515, 13824)])
def test_quantisers_are_their_twins_byte_for_byte(tokens: int, width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(width)
    x = torch.randn(tokens, width, device="cuda", generator=generator)
    x = (x * torch.exp(2 * torch.randn(tokens, 1, device="cuda", generator=generator))).to(torch.bfloat16)
    # The twin on the CPU: torch divides by a number on CUDA by multiplying with its rounded reciprocal.
    pairs = (
        (quantize_nvfp4(x, None), quantize_nvfp4_torch(x.cpu(), None)),
        (quantize_mxfp8(x), quantize_mxfp8_torch(x.cpu())),
    )
    for ours, theirs in pairs:
        assert torch.equal(ours.block_scale.cpu(), theirs.block_scale)
        assert torch.equal(ours.payload.cpu().view(torch.uint8), theirs.payload.view(torch.uint8))
    whole, expected = pairs[0][0].scale, pairs[0][1].scale
    assert whole is not None and expected is not None and torch.equal(whole.cpu(), expected)


@pytest.mark.parametrize("compute", COMPUTES)
def test_the_probe_refuses_where_there_is_no_blackwell(compute: str) -> None:
    refusal = _block_scaled.refuses(compute, 0)
    if torch.cuda.get_device_capability() < (10, 0):
        assert refusal is not None and refusal.startswith("a test product")
    print(f"{torch.cuda.get_device_name()}: {compute}: {refusal or 'runs'}")


@pytest.mark.sm100
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("tokens", "out", "inp"), [(1, 1536, 1536), (257, 8960, 1536), (4096, 5120, 13824)])
def test_products_are_right_at_wans_sizes(compute: str, tokens: int, out: int, inp: int) -> None:
    assert _block_scaled.refuses(compute, 0) is None
    generator = torch.Generator("cuda").manual_seed(tokens)
    rows = torch.randn(tokens, inp, device="cuda", generator=generator).to(torch.bfloat16)
    weight = torch.randn(out, inp, device="cuda", generator=generator) * inp**-0.5
    slots = FORMATS[compute].quantize(weight, True)
    held = FORMATS[compute].quantize(rows, True)
    truth = FORMATS[compute].dequantize(held).double() @ FORMATS[compute].dequantize(slots).double().T
    product = torch_native.kernel(compute, compute)(rows, slots, None).double()
    assert float((product - truth).norm() / truth.norm()) < 6e-3


def test_the_support_page_is_right_about_this_gpu() -> None:
    kinds = {kind.name: kind for kind in KINDS}
    name = GENERATIONS.get(torch.cuda.get_device_capability())
    if name is None:
        pytest.skip(f"docs/support.md has no column for {torch.cuda.get_device_name()}")
    probes = {
        (probe.backend, probe.format, probe.compute): probe
        for probe in examine().probes
        if probe.device == "cuda:0"
    }
    for backend in (backend_named(BACKENDS[module].name) for module in BACKENDS):
        if backend.name == "te" and importlib.util.find_spec("transformer_engine") is None:
            print("te: not held against the page, as transformer_engine is not installed")
            continue
        for weight_format in FORMATS:
            if cell(kinds[name], weight_format, backend.name) == "refused":
                with pytest.raises(BackendUnavailable):
                    choose(weight_format, CUDA, (5120, 13824), Options(backend=backend.name))
                continue
            _, compute, _ = choose(weight_format, CUDA, (5120, 13824), Options(backend=backend.name))
            assert cell(kinds[name], weight_format, backend.name).startswith(word(weight_format, compute))
            error = probes[backend.name, weight_format, compute].error
            assert error is not None and error < (0.15 if compute == "nvfp4" else 0.1)
