"""Each Triton kernel against its plain-torch twin, and the twin against fp64 arithmetic, on the GPU."""

from __future__ import annotations

import pytest
import torch

from wan_runtime.formats import nvfp4

pytestmark = pytest.mark.gpu

WIDTHS = (16, 128, 1000, 1536, 5120, 13824)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_rows_matches_its_twin(width: int, dtype: torch.dtype) -> None:
    from wan_runtime.kernels.quantize_rows import quantize_rows, quantize_rows_torch

    x = torch.randn(77, width, device="cuda", dtype=torch.float32)
    x *= torch.logspace(-4, 4, 77, device="cuda")[:, None]
    x[3] = 0
    x = x.to(dtype)
    codes, scale = quantize_rows(x)
    expected_codes, expected_scale = quantize_rows_torch(x)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A quotient on the edge between two codes may fall to either: one step of e4m3 at most, and rarely.
    differ = codes.view(torch.uint8) != expected_codes.view(torch.uint8)
    assert differ.float().mean() < 1e-3
    restored = codes.double() * scale.double()
    assert ((restored - x.double()).abs() <= x.double().abs() * 2**-4 + scale.double() * 2**-9).all()


def test_quantize_rows_reads_strided_rows_and_writes_every_code() -> None:
    from wan_runtime.kernels.quantize_rows import quantize_rows

    wide = torch.randn(33, 512, device="cuda", dtype=torch.bfloat16)
    view = wide[:, 128:384]
    codes, scale = quantize_rows(view)
    again, scale_again = quantize_rows(view.contiguous())
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))
    assert torch.equal(scale, scale_again)
    assert quantize_rows(view[:0])[0].shape == (0, 256)


@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (1536, 1536), (5120, 13824)])
def test_expand_nvfp4_matches_its_twin(shape: tuple[int, int]) -> None:
    from wan_runtime.kernels.expand_nvfp4 import expand_nvfp4, expand_nvfp4_torch

    weight = torch.randn(*shape, device="cuda") * torch.logspace(-3, 1, shape[0], device="cuda")[:, None]
    weight[0] = 0
    slots = nvfp4.quantize(weight, True)
    codes, scale = expand_nvfp4(slots["payload"], slots["block_scale"], slots["scale"])
    expected_codes, expected_scale = expand_nvfp4_torch(
        slots["payload"], slots["block_scale"], slots["scale"]
    )
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # Many products lie exactly between two codes, so the twins may round apart: each must be a nearest code of the
    # exact value, half a step of e4m3 away at most (2**-4 of a normal value, 2**-10 of the scale of a subnormal one).
    truth = nvfp4.dequantize(slots).double()
    allowed = (truth.abs() * 2**-4 + scale.double() * 2**-10) * (1 + 1e-5)
    for result in (codes.double() * scale.double(), expected_codes.double() * expected_scale.double()):
        assert ((result - truth).abs() <= allowed).all()
        assert (result - truth).norm() <= 0.04 * truth.norm()
    assert not codes[0].double().any()
