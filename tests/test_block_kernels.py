"""The block quantisers of activations, run by Triton (its interpreter where there is no GPU), against their plain-torch
twins byte for byte, and against values that can be named."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests.test_kernels import DEVICE, DTYPES, GPU, draw
from wan_runtime.dialects._swizzle import padded, unswizzle
from wan_runtime.formats import nvfp4
from wan_runtime.kernels.quantize_mxfp8 import quantize_mxfp8, quantize_mxfp8_torch
from wan_runtime.kernels.quantize_nvfp4 import Blocks, quantize_nvfp4, quantize_nvfp4_torch

# Tokens and widths short of a tile of scales (128 tokens, 4 blocks), past one, and a row of 8 bytes, which is padded.
SHAPES = [(5, 64), (1, 16), (33, 96), (130, 208), (128, 256)] + ([(1031, 1536), (515, 5120)] if GPU else [])


def sample(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Tokens that differ in size; where there are several, a block of zeros, a tiny one and a negative zero."""
    x = draw(tokens, width, seed=1, dtype=dtype)
    if tokens > 1:
        x[0, :16] = 0
        x[0, 0] = -0.0
        x[-1, -16:] *= 1e-4
    return x


def bytes_of(blocks: Blocks) -> tuple[torch.Tensor, ...]:
    scale = () if blocks.scale is None else (blocks.scale.view(torch.int32),)
    return (blocks.payload.view(torch.uint8), blocks.block_scale, *scale)


@pytest.mark.parametrize("static", [None, 3e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_nvfp4_is_its_twin_byte_for_byte(
    tokens: int, width: int, dtype: torch.dtype, static: float | None
) -> None:
    x = sample(tokens, width, dtype)
    given = None if static is None else torch.full((1, 1), static, device=DEVICE)
    # The twin on the CPU: torch divides by a number on CUDA by multiplying with its rounded reciprocal.
    blocks = quantize_nvfp4(x, given)
    twin = quantize_nvfp4_torch(x.cpu(), None if given is None else given.cpu())
    assert blocks.payload.shape == (tokens, -(-width // 32) * 16)
    assert blocks.block_scale.shape == padded(tokens, width // 16)
    for ours, theirs in zip(bytes_of(blocks), bytes_of(twin), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)
    assert blocks.scale is not None
    expected = float(x.abs().max()) / 2688 if static is None else static
    assert float(blocks.scale) == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("exact_casts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [shape for shape in SHAPES if shape[1] % 32 == 0])
def test_mxfp8_is_its_twin_byte_for_byte(tokens: int, width: int, dtype: torch.dtype) -> None:
    x = sample(tokens, width, dtype)
    blocks, twin = quantize_mxfp8(x), quantize_mxfp8_torch(x.cpu())
    for ours, theirs in zip(bytes_of(blocks), bytes_of(twin), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_holds_no_number_says_so_and_no_other_does(damage: float) -> None:
    x = draw(3, 128, seed=1, dtype=torch.bfloat16)
    x[1, 40] = damage
    for function in (quantize_mxfp8, quantize_mxfp8_torch):
        scales = unswizzle(function(x).block_scale, 3, 4)
        assert (scales == 255).nonzero().tolist() == [[1, 1]]
    given = torch.full((1, 1), 1e-3, device=DEVICE)
    for static in (None, given):
        for quantize in (quantize_nvfp4, quantize_nvfp4_torch):
            blocks = quantize(x, static)
            scales = unswizzle(blocks.block_scale, 3, 8)
            assert blocks.scale is not None
            whole = bool(blocks.scale.isfinite())  # infinity makes the whole tensor's scale infinite
            assert scales[1, 2] == 0x7F or not whole
            assert (scales == 0x7F).sum() <= 1


def test_every_e2m1_threshold_and_every_e4m3_scale() -> None:
    """Ties go to the even code, at each of the seven thresholds; a block scale is e4m3's nearest, for all its bytes."""
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0]
    )
    blocks = quantize_nvfp4(ties.reshape(1, 16).to(DEVICE), torch.ones(1, 1, device=DEVICE))
    low, high = blocks.payload[0, :8] & 15, blocks.payload[0, :8] >> 4
    codes = torch.stack((low, high), 1).flatten().tolist()
    assert codes == [0, 2, 2, 4, 4, 6, 6, 7, 8, 10, 10, 12, 12, 14, 14, 0]
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (every[1:] + every[:-1]) / 2  # ties
    beside = torch.cat((between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(500.0))))
    wanted = torch.cat((every, between, beside)).reshape(-1, 1)
    x = (6 * wanted.double()).float() * torch.cat((torch.ones(1, 1), torch.zeros(1, 15)), 1)
    scales = quantize_nvfp4(x.to(DEVICE), torch.ones(1, 1, device=DEVICE)).block_scale
    expected = (x[:, :1] / 6).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(unswizzle(scales, len(x), 1).cpu(), expected)


def test_what_a_static_scale_does_not_reach_saturates() -> None:
    x = torch.full((1, 16), 100.0, device=DEVICE)
    blocks = quantize_nvfp4(x, torch.full((1, 1), 1e-3, device=DEVICE))
    assert blocks.block_scale.flatten()[0] == 0x7E and (blocks.payload[0, :8] == 0x77).all()


def test_rows_that_lie_apart_and_a_tensor_of_zeros() -> None:
    wide = draw(7, 192, seed=1, dtype=torch.bfloat16)
    for function in (lambda x: quantize_nvfp4(x, None), quantize_mxfp8):
        apart, close = function(wide[:, 64:128]), function(wide[:, 64:128].contiguous())
        assert torch.equal(apart.payload.view(torch.uint8), close.payload.view(torch.uint8))
        assert torch.equal(apart.block_scale, close.block_scale)
    zeros = quantize_nvfp4(torch.zeros(2, 32, device=DEVICE), None)
    assert zeros.scale == 1 and not zeros.payload.any()
    assert (unswizzle(zeros.block_scale, 2, 2) == 1).all()  # the least scale, 2^-9, as for weights
    assert nvfp4.SMALLEST_BLOCK_SCALE == 2.0**-9
