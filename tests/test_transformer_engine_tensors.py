"""A layer's slots as Transformer Engine's tensors: the same memory, and the weight that Transformer Engine reads in it.

This takes that library and no GPU: its FP8 tensors dequantise on a CPU, and its reference for NVFP4 is plain torch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.builders.codes import E4M3
from wan_runtime.backends import transformer_engine as engine
from wan_runtime.formats import FORMATS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer_engine is not installed"
)
OUT, INP = 160, 96


def quantised(weight_format: str, out: int = OUT, inp: int = INP) -> dict[str, torch.Tensor]:
    weight = torch.randn(out, inp, generator=torch.Generator().manual_seed(0))
    return FORMATS[weight_format].quantize(weight, False)


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def test_fp8_codes_and_scale_are_the_slots_own_memory_and_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(16).reshape(16, 256)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    slots = {"payload": codes, "scale": torch.tensor([[0.1]])}
    before = {name: slot.clone() for name, slot in slots.items()}
    held = engine.weight_of("fp8", slots, torch.bfloat16)
    assert memory(held._data) == memory(codes) and memory(held._scale_inv) == memory(slots["scale"])
    assert torch.equal(held._data, before["payload"]) and torch.equal(held._scale_inv, before["scale"][0])
    assert held.shape == (16, 256) and held.dtype == torch.bfloat16 and held._transpose is None
    meant = torch.from_numpy(E4M3[codes.numpy()]).float() * before["scale"]
    assert torch.equal(held.dequantize(dtype=torch.float32), meant)


def test_several_scales_are_never_read_as_one() -> None:
    slots = {"payload": torch.zeros(16, 16, dtype=torch.uint8), "scale": torch.ones(16, 1)}
    with pytest.raises(RuntimeError, match="invalid for input of size 16"):
        engine.weight_of("fp8", slots, torch.bfloat16)


@pytest.mark.parametrize(("out", "inp"), [(OUT, INP), (1536, 8960), (64, 5120)])
@pytest.mark.parametrize("compute", ["mxfp8", "nvfp4"])
def test_block_scaled_codes_are_the_slots_own_memory(compute: str, out: int, inp: int) -> None:
    import transformer_engine.pytorch as te

    slots = quantised(compute, out, inp)
    held: Any = engine.weight_of(compute, slots, torch.bfloat16)
    assert memory(held._rowwise_data) == memory(slots["payload"])
    assert held.shape == (out, inp) and held._columnwise_data is None and not held._with_gemm_swizzled_scales
    blocks, scales = slots["block_scale"], held._rowwise_scale_inv
    kind: Any = te.MXFP8Quantizer if compute == "mxfp8" else te.NVFP4Quantizer
    assert tuple(scales.shape) == kind.get_scale_shape(None, (out, inp), columnwise=False)
    assert scales.dtype == torch.uint8 and torch.equal(scales[: blocks.shape[0], : blocks.shape[1]], blocks)
    assert not scales[blocks.shape[0] :].any() and not scales[:, blocks.shape[1] :].any()


@pytest.mark.parametrize("compute", engine.ALIGNMENT)
def test_odd_sides_are_padded_with_zeros(compute: str) -> None:
    slots = quantised(compute, 72, 96 if compute == "mxfp8" else 80)
    held: Any = engine.weight_of(compute, slots, torch.bfloat16)
    side = engine.ALIGNMENT[compute][1]
    assert held.shape == tuple(-(-size // side) * side for size in (72, 96 if compute == "mxfp8" else 80))
    codes = held._data if compute == "fp8" else held._rowwise_data
    rows, cols = slots["payload"].shape
    assert torch.equal(codes[:rows, :cols], slots["payload"])
    assert not codes[rows:].any() and not codes[:, cols:].any()


def its_reference() -> tuple[Any, Any]:
    """Transformer Engine's modules of NVFP4 in plain torch: its quantiser and product, and the names of formats."""
    named = "transformer_engine.pytorch.custom_recipes"
    nvfp4, formats = (
        pytest.importorskip(f"{named}.{name}", reason="this version has none of that name")
        for name in ("reference_nvfp4", "reference_utils")
    )
    return nvfp4, formats


def test_its_own_reference_reads_the_same_nvfp4_weight() -> None:
    """Its reference product of the unit matrix, whose rows its quantiser holds exactly, is the weight."""
    reference, formats = its_reference()
    slots = quantised("nvfp4")
    held: Any = engine.weight_of("nvfp4", slots, torch.bfloat16)
    quantizer = reference.NVFP4QuantizerRef(formats.Fp4Formats.E2M1, rowwise=True, columnwise=False)
    units = quantizer.quantize(torch.eye(INP))
    weight = reference.NVFP4TensorRef()
    weight.global_amax_col = weight.global_amax_row = held._amax_rowwise
    scales = held._rowwise_scale_inv[:OUT, : INP // 16].view(torch.float8_e4m3fn)
    product = quantizer.qgemm(
        units.data.view(torch.uint8), held._rowwise_data, None, torch.float32,
        units.scale.view(torch.float8_e4m3fn), scales, qresult_x=units, qresult_w=weight,
    )  # fmt: skip
    meant = FORMATS["nvfp4"].dequantize(slots)
    assert torch.allclose(product.t(), meant, rtol=1e-5, atol=1e-6 * float(meant.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_codes_and_scales_are_those_of_its_own_reference(dtype: torch.dtype) -> None:
    """Its reference multiplies by a reciprocal where we divide: another code in a tie alone, as bf16 weights have."""
    reference, formats = its_reference()
    weight = torch.randn(512, 1536, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = FORMATS["nvfp4"].quantize(weight, False)
    quantizer = reference.NVFP4QuantizerRef(formats.Fp4Formats.E2M1, rowwise=True, columnwise=False)
    theirs = quantizer.quantize(weight)
    assert torch.equal(ours["block_scale"], theirs.scale.view(torch.uint8))
    assert torch.equal(weight.abs().amax().float(), theirs.global_amax_row.reshape(()))
    step = (theirs.scale.double() * ours["scale"].double()).repeat_interleave(16, 1)
    fourfold = (weight.double() / step).abs() * 4
    tie = (fourfold - fourfold.round()).abs() < 1e-5
    differ = ours["payload"] ^ theirs.data.view(torch.uint8)
    same = torch.stack((differ & 0xF, differ >> 4), -1).reshape(weight.shape) == 0
    assert (same | tie).all() and same.double().mean() > 0.99
