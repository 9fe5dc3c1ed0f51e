"""The fused kernels where the next product takes MXFP8 or NVFP4: what they write is what the block quantisers would
make of their values, byte for byte, as Triton runs it (its interpreter where there is no GPU)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests.test_kernels import DEVICE, EPS, GPU, draw, index_of
from wan_runtime.dialects._swizzle import padded, unswizzle
from wan_runtime.formats import FORMATS
from wan_runtime.kernels import ops
from wan_runtime.kernels._codes import Codes
from wan_runtime.kernels._launch import first_part
from wan_runtime.kernels._rows import Rows
from wan_runtime.kernels.attention_output import attention_output, attention_output_torch
from wan_runtime.kernels.gelu_quantize import gelu_quantize, gelu_quantize_torch
from wan_runtime.kernels.norm_modulate import Modulation, norm_modulate, norm_modulate_torch
from wan_runtime.kernels.quantize_mxfp8 import quantize_mxfp8_torch
from wan_runtime.kernels.quantize_nvfp4 import quantize_nvfp4_torch
from wan_runtime.kernels.residual_norm import residual_norm, residual_norm_torch

# One block; parts that end in the middle of a tile and at its end; past a tile's tokens; Wan's where it is quick.
SHAPES = [(3, 32), (130, 160), (7, 384)] + ([(1031, 1536), (515, 5120), (130, 13824)] if GPU else [])
KINDS = {Codes.MXFP8: 32, Codes.NVFP4: 16}
pytestmark = [
    pytest.mark.usefixtures("exact_casts"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

Kernel = Callable[[torch.Tensor, int], Rows]


def kernels(
    tokens: int, width: int, entries: int = 1, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[Kernel, Kernel, Kernel]]:
    """Each fused kernel of values and codes: as Triton runs it, its plain-torch twin, and the operator."""
    bias, gate = draw(width, seed=2), draw(entries, width, seed=3)
    index = index_of(tokens, entries) if entries > 1 else None
    table = Modulation(draw(entries, width, seed=4), draw(entries, width, seed=5), EPS, index=index)
    stream = draw(tokens, width, seed=6, dtype=dtype)

    def sums(function: Callable[..., tuple[torch.Tensor, Rows | None]]) -> Kernel:
        def kernel(x: torch.Tensor, codes: int) -> Rows:
            rows = function(x, bias, gate, stream, index, table, codes)[1]
            assert rows is not None
            return rows

        return kernel

    def each(*functions: Callable[..., Rows]) -> tuple[Kernel, Kernel, Kernel]:
        one, two, three = functions
        return lambda x, c: one(x, c), lambda x, c: two(x, c), lambda x, c: three(x, c)

    return {
        "norm_modulate": each(
            lambda x, c: norm_modulate(x, table, c),
            lambda x, c: norm_modulate_torch(x, table, c),
            lambda x, c: ops.norm_modulate(x, table, c),
        ),
        "residual_norm": (sums(residual_norm), sums(residual_norm_torch), sums(ops.residual_norm)),
        "gelu_quantize": each(
            lambda x, c: gelu_quantize(x, bias, c),
            lambda x, c: gelu_quantize_torch(x, bias, c),
            lambda x, c: ops.gelu_quantize(x, bias, c),
        ),
        "attention_output": each(
            lambda x, c: attention_output(x, bias, x, c),
            lambda x, c: attention_output_torch(x, bias, x, c),
            lambda x, c: ops.attention_output(x, bias, x, c),
        ),
    }


NAMES = tuple(kernels(1, 32))


def bytes_of(rows: Rows) -> list[torch.Tensor]:
    return [t.view(torch.uint8).cpu() for t in (rows.values, rows.scale, rows.whole) if t is not None]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Byte for byte where the interpreter rounds both alike. A GPU runs two compilations, which contract products and
    sums each in its own way: a value on the edge between two codes may get the other, and its block another scale."""
    apart = [float((a != b).float().mean()) for a, b in zip(ours, theirs, strict=True)]
    assert [len(a) for a in ours] == [len(b) for b in theirs]
    print("share of bytes apart, and bytes:", apart, [a.numel() for a in ours])
    return max(apart) <= (1e-4 if GPU else 0.0)


def values_of(rows: Rows, codes: Codes, width: int) -> torch.Tensor:
    """The fp32 values that coded rows mean, by the weight formats' own reading."""
    assert rows.scale is not None
    tokens = rows.values.shape[0]
    slots = {
        "payload": rows.values.view(torch.uint8).cpu()[:, : width if codes is Codes.MXFP8 else width // 2],
        "block_scale": unswizzle(rows.scale.cpu(), tokens, width // KINDS[codes]),
    }
    if rows.whole is not None:
        slots["scale"] = rows.whole.cpu().reshape(1, 1)
    return FORMATS[codes.name.lower()].dequantize(slots)


@pytest.mark.parametrize("codes", KINDS)
@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        pytest.param(name, *shape, marks=[pytest.mark.long] if shape[0] >= 128 else [])
        for name in NAMES
        for shape in SHAPES
        # The interpreter is slow, and every kernel writes many tokens alike; a row of GELU's has three parts.
        if (name == "attention_output" or shape[0] < 128 or GPU)
        and (name, shape) != ("gelu_quantize", (3, 32))
    ],
)
def test_codes_are_the_quantisers_of_the_kernels_own_values(
    name: str, tokens: int, width: int, codes: Codes
) -> None:
    """Byte for byte, the padding of the scales too. NVFP4's codes are of the rounded values that go through memory."""
    dtype = torch.bfloat16 if codes is Codes.NVFP4 else torch.float32
    x = draw(tokens, width, seed=1, dtype=dtype)
    x[0, :32] *= 1e-4
    kernel, _, operator = kernels(tokens, width, dtype=dtype)[name]
    rows, values = kernel(x, codes), kernel(x, Codes.PLAIN).values.cpu()
    blocks = quantize_nvfp4_torch(values, None) if codes is Codes.NVFP4 else quantize_mxfp8_torch(values)
    expected = bytes_of(Rows(blocks.payload, blocks.block_scale, blocks.scale))
    assert same(bytes_of(rows), expected)
    assert rows.scale is not None and rows.scale.shape == padded(tokens, width // KINDS[codes])
    if tokens < 128:
        whole = operator(x, codes)
        assert all(torch.equal(a, b) for a, b in zip(bytes_of(whole), bytes_of(rows), strict=True))


@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize("codes", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_codes_mean_what_the_twins_mean(name: str, codes: Codes, entries: int) -> None:
    """Sums in another order move a value by an fp32 rounding, and so a code now and then.

    In fp32, as Triton's interpreter (3.9) cuts what it casts to bf16.
    """
    x = draw(9, 384, seed=1)
    kernel, twin, _ = kernels(9, 384, entries, torch.float32)[name]
    ours, theirs = (values_of(function(x, codes), codes, 384) for function in (kernel, twin))
    plain = twin(x, Codes.PLAIN).values.cpu()
    apart = float((ours - theirs).norm() / theirs.norm())
    rounding = float((theirs - plain).norm() / plain.norm())
    assert apart < rounding / 10
    assert rounding < (0.04 if codes is Codes.MXFP8 else 0.12)


@pytest.mark.parametrize("codes", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_and_no_numbers(name: str, codes: Codes) -> None:
    kernel, _, _ = kernels(5, 96)[name]
    if name != "residual_norm":  # whose residual has five tokens
        none = kernel(torch.empty(0, 96, dtype=torch.bfloat16, device=DEVICE), codes)
        assert none.values.shape[0] == 0 and none.scale is not None
    x = draw(5, 96, seed=1, dtype=torch.bfloat16)
    x[3, 40] = float("nan")
    rows = kernel(x, codes)
    assert rows.scale is not None
    scales = unswizzle(rows.scale.cpu(), 5, 96 // KINDS[codes])
    nan = 255 if codes is Codes.MXFP8 else 0x7F
    told = bool(scales[3].eq(nan).any()) or (rows.whole is not None and not bool(rows.whole.isfinite()))
    assert told, "the damage was lost"
    assert not scales[[0, 1, 2, 4]].eq(nan).any() or codes is Codes.NVFP4


@pytest.mark.parametrize("width", [32, 64, 96, 160, 224, 1024, 1536, 5120, 8960, 13824, 14336])
def test_parts_of_a_row_hold_whole_blocks(width: int) -> None:
    a, rest = first_part(width)
    b, last = first_part(rest) if rest else (32, 0)
    assert a % 32 == 0 and b % 32 == 0 and a + b + last >= width


@pytest.mark.parametrize("codes", Codes)
@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_is_told_the_shapes_that_come(name: str, codes: Codes) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def shapes(rows: Rows) -> list[tuple[torch.Size, torch.dtype] | None]:
        return [None if t is None else (t.shape, t.dtype) for t in (rows.values, rows.scale, rows.whole)]

    x = draw(3, 96, seed=1, dtype=torch.bfloat16)
    real = shapes(kernels(3, 96)[name][2](x, codes))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert shapes(kernels(3, 96)[name][2](torch.empty_like(x), codes)) == real
