"""LightX2V's files, by its published kernels and converter: vectors worked out by hand, and its formulas transcribed.

LightX2V's own quantisers run on one kind of GPU only, so nothing here can call them. The scale offsets come from
lightx2v_kernel/csrc/gemm/nvfp4_quant_kernels_sm120.cu (cvt_quant_to_fp4_get_sf_out_offset), the six-bit packing from
mxfp6_quant_kernels_sm120.cu, the global scales from tools/convert/quant/quant.py and add_scale_to_models.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.files import Content
from tests.builders.wan import block_linears, state
from tests.reading import FIRST, content
from wan_runtime.checkpoint import open_checkpoint, read_layer
from wan_runtime.dialects import DIALECTS, lightx2v
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.formats import FORMATS

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
LIGHTX2V = DIALECTS["lightx2v"]


def kernel_offset(row: int, block: int, columns: int, block_size: int) -> int:
    """Byte of a row's block scale: the kernel's index arithmetic, term by term, with its names."""
    m_tile, outer_m, inner_m = row // 128, row % 32, (row // 32) % 4
    k_tile, inner_k = block // 4, block % 4
    m_tile_stride = (columns + block_size * 4 - 1) // (block_size * 4) * (32 * 4 * 4)
    return m_tile * m_tile_stride + k_tile * (32 * 4 * 4) + outer_m * (4 * 4) + inner_m * 4 + inner_k


def _file(layers: dict[str, torch.Tensor], modules: list[str]) -> Content:
    """A model whose quantised Linears all hold the given tensors; shapes of [128, 128] only."""
    tensors = {k: t for k, t in state().items() if k.removesuffix(".weight") not in modules}
    for module in modules:
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in layers.items()}
    return Content(tensors)


SQUARE = [module for module in block_linears() if "ffn" not in module]


def _nvfp4(
    garbage: int | None = None,
) -> tuple[dict[str, torch.Tensor], np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """A [128, 128] layer with a different scale in every block, and its codes times scales before the global one."""
    generator = np.random.default_rng(0)
    payload = generator.integers(0, 256, (128, 64), dtype=np.uint8)
    sizes = generator.integers(1, 0x7E, (128, 8), dtype=np.uint8)  # e4m3 bytes, none zero or NaN
    stored = np.zeros(128 * 8, dtype=np.uint8)
    truth = np.empty((128, 128))
    values = torch.from_numpy(sizes).view(torch.float8_e4m3fn).double().numpy()
    for row in range(128):
        for block in range(8):
            stored[kernel_offset(row, block, 128, 16)] = sizes[row, block]
        for column in range(128):
            byte = int(payload[row, column // 2])
            truth[row, column] = E2M1[byte >> 4 if column % 2 else byte & 15] * values[row, column // 16]
    scales = torch.from_numpy(stored).reshape(128, 8).view(torch.float8_e4m3fn)
    return {"weight": torch.from_numpy(payload), "weight_scale": scales}, truth


AMAX, INPUT_AMAX = 0.37, 5.9


def _global_scales() -> dict[str, torch.Tensor]:
    """As the converter and add_scale_to_models.py compute them, in fp32."""
    weight_global_scale = (2688.0 / torch.tensor(AMAX)).to(torch.float32)
    input_global_scale = (2688.0 / torch.tensor(INPUT_AMAX)).to(torch.float32)
    return {
        "weight_global_scale": weight_global_scale,
        "input_global_scale": input_global_scale,
        "alpha": 1.0 / (input_global_scale * weight_global_scale),
    }


@pytest.mark.parametrize(
    "given",
    [
        ("weight_global_scale",),
        ("alpha", "input_global_scale"),
        ("weight_global_scale", "input_global_scale", "alpha"),
    ],
    ids=["as converted", "as released", "both"],
)
def test_nvfp4_means_codes_times_block_scale_over_the_global_scale(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    tensors, truth = _nvfp4()
    tensors |= {name: tensor for name, tensor in _global_scales().items() if name in given}
    checkpoint = open_checkpoint(_file(tensors, SQUARE).write(tmp_path))
    assert checkpoint.dialect.name == "lightx2v" and checkpoint.layers[FIRST].format == "nvfp4"
    slots = read_layer(checkpoint, FIRST)
    weight = FORMATS["nvfp4"].dequantize(slots).double().numpy()
    np.testing.assert_allclose(weight, truth * AMAX / 2688, rtol=1e-6, atol=0)
    if "input_global_scale" in given:
        torch.testing.assert_close(
            slots["input_scale"], torch.tensor([[INPUT_AMAX / 2688]]), rtol=1e-6, atol=0
        )
    else:
        assert "input_scale" not in slots


def test_global_scales_of_two_files_are_refused(tmp_path: Path) -> None:
    tensors, _ = _nvfp4()
    wanted = _file(tensors | _global_scales(), SQUARE)
    wanted.tensors[f"{FIRST}.weight_global_scale"] *= 1.001
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    with pytest.raises(BadTensor, match=r"global scales disagree.* is 1\.001, not 1"):
        read_layer(checkpoint, FIRST)


@pytest.mark.parametrize("lost", [("alpha",), ("input_global_scale",), ("alpha", "input_global_scale")])
def test_nvfp4_without_its_global_scale_is_refused(tmp_path: Path, lost: tuple[str, ...]) -> None:
    tensors, _ = _nvfp4()
    scales = _global_scales()
    del scales["weight_global_scale"]
    wanted = _file(tensors | scales, SQUARE)
    for name in lost:
        del wanted.tensors[f"{FIRST}.{name}"]
    with pytest.raises(BadTensor, match=f"{FIRST}.weight.*global scale is missing"):
        open_checkpoint(wanted.write(tmp_path))


def test_alpha_without_its_partner_is_refused_beside_a_weight_global_scale(tmp_path: Path) -> None:
    tensors, _ = _nvfp4()
    wanted = _file(tensors | _global_scales(), SQUARE)
    del wanted.tensors[f"{FIRST}.input_global_scale"]
    with pytest.raises(BadTensor, match="It has alpha, weight_global_scale"):
        open_checkpoint(wanted.write(tmp_path))


MX = {"mxfp8": 1.0, "mxfp6": 0.75, "mxfp4": 0.5}


@pytest.mark.parametrize("rows", [128, 200])
@pytest.mark.parametrize("weight_format", MX)
def test_mx_scales_lie_where_the_kernel_puts_them_and_padding_is_not_read(
    weight_format: str, rows: int
) -> None:
    """All codes are the same, so the weight shows each block's scale. The padding is 255, E8M0's NaN."""
    columns = 160  # five blocks: three of the second tile's four columns are padding
    ones = {"mxfp8": [0x38], "mxfp6": [0x0C, 0xC3, 0x30], "mxfp4": [0x22]}[weight_format]
    generator = np.random.default_rng(1)
    exponents = generator.integers(100, 140, (rows, 5))
    stored = np.full(math.ceil(rows / 128) * 128 * 8, 255, dtype=np.uint8)
    for row in range(rows):
        for block in range(5):
            stored[kernel_offset(row, block, columns, 32)] = exponents[row, block]
    count = int(columns * MX[weight_format]) // len(ones)
    tensors = {
        "weight": torch.tensor(ones * count, dtype=torch.uint8).repeat(rows, 1),
        "weight_scale": torch.from_numpy(stored).reshape(-1, 8).view(torch.float8_e8m0fnu),
    }
    block_scale = lightx2v._mx_scales(tensors["weight_scale"], rows, columns)
    slots = {"payload": tensors["weight"], "block_scale": block_scale}
    FORMATS[weight_format].check(slots)
    weight = FORMATS[weight_format].dequantize(slots).double().numpy()

    np.testing.assert_array_equal(weight, np.repeat(2.0 ** (exponents - 127.0), 32, axis=1))


def test_mxfp6_bytes_are_the_kernel_s() -> None:
    """p0 = [b1 b0 a5..a0], p1 = [c3..c0 b5..b2], p2 = [d5..d0 c5 c4], for four codes that use every bit apart."""
    a, b, c, d = 0b100001, 0b010110, 0b001011, 0b110100
    packed = [(b & 3) << 6 | a, (c & 15) << 4 | b >> 2, d << 2 | c >> 4]
    # e3m2: a = -(1/16), b = 1.5 * 4 ... worked out: exponent field, mantissa field, sign.
    values = [-0.0625, 1.5 * 2.0**2, 1.75 * 2.0**-1, -(1.0 * 2.0**2)]
    assert [b >> 2 & 7, b & 3, c >> 2 & 7, c & 3, d >> 2 & 7, d & 3] == [5, 2, 2, 3, 5, 0]
    slots = {
        "payload": torch.tensor([packed * 8], dtype=torch.uint8),
        "block_scale": torch.tensor([[127]], dtype=torch.uint8),
    }
    assert FORMATS["mxfp6"].dequantize(slots)[0].tolist() == values * 8


@pytest.mark.parametrize("weight_format", MX)
def test_a_whole_mx_file_is_told_by_its_sizes(tmp_path: Path, weight_format: str) -> None:
    """Nothing in the file names the format: row bytes, scale columns and the model's widths do."""
    checkpoint = open_checkpoint(content("lightx2v", weight_format).write(tmp_path))
    assert {layer.format for layer in checkpoint.layers.values()} == {weight_format}
    assert checkpoint.layers[FIRST].shape == (128, 128)
    assert checkpoint.layers["blocks.0.ffn.2"].shape == (128, 256)


def test_mx_sizes_that_fit_no_format_are_refused(tmp_path: Path) -> None:
    wanted = content("lightx2v", "mxfp8")
    wanted.tensors[f"{FIRST}.weight"] = wanted.tensors[f"{FIRST}.weight"][:, :80]
    with pytest.raises(BadTensor, match="neither MXFP8, MXFP6 nor MXFP4"):
        open_checkpoint(wanted.write(tmp_path))
    mixed = content("lightx2v", "mxfp8")
    mixed.tensors |= {
        k: t for k, t in content("lightx2v", "mxfp4").tensors.items() if k.startswith("blocks.1.")
    }
    with pytest.raises(CheckpointError, match="or the file mixes them"):
        open_checkpoint(mixed.write(tmp_path / "mixed"))


def test_int8_reaches_minus_128(tmp_path: Path) -> None:
    """The converter clamps to [-128, 127]."""
    tensors = {
        "weight": torch.full((128, 128), -128, dtype=torch.int8),
        "weight_scale": torch.full((128, 1), 2.0**-12),
    }
    checkpoint = open_checkpoint(_file(tensors, SQUARE).write(tmp_path))
    assert (checkpoint.dialect.name, checkpoint.layers[FIRST].format) == ("lightx2v", "int8")
    assert FORMATS["int8"].dequantize(read_layer(checkpoint, FIRST)).unique().tolist() == [-(2.0**-5)]


@pytest.mark.parametrize(("dtype", "weight_format"), [(torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")])
@pytest.mark.parametrize("shape", [(), (1,), (128, 1), (128,)])
def test_fp8_and_int8_with_a_float_scale_have_one_reading(
    tmp_path: Path, dtype: torch.dtype, weight_format: str, shape: tuple[int, ...]
) -> None:
    """D1 and D2 share their keys with Model Optimizer and others; all of them multiply, and one dialect reads each."""
    codes = torch.randint(-100, 100, (128, 128), generator=torch.Generator().manual_seed(2))
    tensors = {"weight": codes.float().to(dtype), "weight_scale": (torch.rand(shape) + 0.5) * 1e-3}
    checkpoint = open_checkpoint(_file(tensors, SQUARE).write(tmp_path))
    slots = read_layer(checkpoint, FIRST)
    assert checkpoint.layers[FIRST].format == weight_format
    truth = tensors["weight"].double() * tensors["weight_scale"].double().reshape(-1, 1)
    torch.testing.assert_close(FORMATS[weight_format].dequantize(slots).double(), truth, rtol=2**-23, atol=0)


def test_what_is_written_is_what_the_runtime_loads() -> None:
    """FP8 with a scale a row, from one scale too; NVFP4 as released, its product the scale to the bit."""
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    rows = LIGHTX2V.encode("fp8", FORMATS["fp8"].quantize(weight, True))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in rows.items()} == {
        "weight": (torch.float8_e4m3fn, (128, 128)),
        "weight_scale": (torch.float32, (128, 1)),
    }
    one = LIGHTX2V.encode("fp8", FORMATS["fp8"].quantize(weight, False))
    assert one["weight_scale"].shape == (128, 1) and one["weight_scale"].unique().numel() == 1
    slots = FORMATS["nvfp4"].quantize(weight, False)
    converted = LIGHTX2V.encode("nvfp4", slots)
    assert converted.keys() == {"weight", "weight_scale", "weight_global_scale"}
    torch.testing.assert_close(
        1 / converted["weight_global_scale"], slots["scale"][0, 0], rtol=2**-23, atol=0
    )
    generator = torch.Generator().manual_seed(4)
    for _ in range(500):
        slots["scale"] = torch.rand(1, 1, generator=generator) * 1e-3
        slots["input_scale"] = torch.rand(1, 1, generator=generator) * 1e-2
        released = LIGHTX2V.encode("nvfp4", slots)
        assert released.keys() == {"weight", "weight_scale", "alpha", "input_global_scale"}
        assert (released["alpha"] * released["input_global_scale"]).item() == slots["scale"].item()
        inverse = 1 / released["input_global_scale"]
        torch.testing.assert_close(inverse, slots["input_scale"][0, 0], rtol=2**-17, atol=0)
