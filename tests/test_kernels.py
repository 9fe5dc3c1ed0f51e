"""Each fused kernel, run by Triton (its interpreter where there is no GPU), against its plain-torch twin, and the twin
against the same arithmetic in fp64."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from wan_runtime.kernels._launch import Launch
from wan_runtime.kernels._rows import Rows, written
from wan_runtime.kernels.attention_output import attention_output, attention_output_torch
from wan_runtime.kernels.gelu_quantize import gelu_quantize, gelu_quantize_torch
from wan_runtime.kernels.norm_modulate import Modulation, norm_modulate, norm_modulate_torch
from wan_runtime.kernels.norm_rope import bounded, norm_rope, norm_rope_torch
from wan_runtime.kernels.quantize_heads import quantize_heads, quantize_heads_torch
from wan_runtime.kernels.residual_norm import residual_norm, residual_norm_torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EPS = 1e-6
SHAPES = [(5, 16), (7, 384), (3, 1000)] + ([(1031, 1536), (515, 5120), (130, 13824)] if GPU else [])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    spread = torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
    return (values * spread if len(shape) > 1 else values).to(DEVICE, dtype)


def index_of(tokens: int, entries: int) -> torch.Tensor:
    return (torch.arange(tokens, device=DEVICE) % entries).to(torch.int32)


def assert_rows(rows: Rows, truth: torch.Tensor) -> None:
    """Codes within half a step of the fp64 truth, or plain values within a rounding of their dtype."""
    truth = truth.double()
    if rows.scale is None:
        step = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[rows.values.dtype]
        assert ((rows.values.double() - truth).abs() <= truth.abs() * step + 1e-4).all()
        return
    assert rows.values.dtype is torch.float8_e4m3fn and rows.scale.shape == (truth.shape[0], 1)
    amax = truth.abs().amax(1, keepdim=True)
    torch.testing.assert_close(rows.scale.double(), amax / 448, rtol=1e-4, atol=0)
    allowed = truth.abs() * 2**-4 + rows.scale * 2**-10
    assert ((rows.dequantised().double() - truth).abs() <= allowed * (1 + 1e-3)).all()


def assert_twins(rows: Rows, twin: Rows) -> None:
    """Equal scales, and codes that differ rarely and by one step.

    Triton's interpreter (3.9) drops the carry when a value rounds up to a power of two, and gives half of it.
    """
    if rows.scale is None or twin.scale is None:
        assert rows.scale is twin.scale is None
        torch.testing.assert_close(rows.values, twin.values, rtol=1.6e-2, atol=1e-4)
        return
    torch.testing.assert_close(rows.scale, twin.scale, rtol=1e-5, atol=0)
    ours, theirs = rows.values.float(), twin.values.float()
    lost_carry = (ours * 2 == theirs) & (theirs.abs().log2().frac() == 0) & (not GPU)
    differ = (ours != theirs) & ~lost_carry
    assert differ.float().mean() < 0.02
    assert ((ours - theirs).abs()[differ] <= theirs.abs()[differ] * 2**-3 + 2**-9).all()


def test_the_interpreter_runs_where_there_is_no_gpu() -> None:
    assert GPU or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("entries", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norm_modulate(tokens: int, width: int, entries: int, codes: bool) -> None:
    x = draw(tokens, width, seed=1, dtype=torch.bfloat16)
    table = draw(max(entries, 1), 6, width, seed=2)
    index = index_of(tokens, entries) if entries else None
    modulation = Modulation(table[:, 1], table[:, 0], EPS, index=index)
    twin = norm_modulate_torch(x, modulation, codes)
    wide = x.double()
    normal = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, keepdim=True, unbiased=False) + EPS).sqrt()
    picked = table.double()[index.long() if index is not None else torch.zeros(tokens, dtype=torch.long)]
    assert_rows(twin, normal * (1 + picked[:, 1]) + picked[:, 0])
    for rows in (1, 4):
        assert_twins(norm_modulate(x, modulation, codes, Launch(rows)), twin)


@pytest.mark.parametrize(
    ("dtype", "mean", "share"),
    [(torch.bfloat16, 50, 1 / 8), (torch.float16, 100, 1 / 8), (torch.float32, 3000, 4)],
)
def test_a_norm_of_values_far_from_zero(dtype: torch.dtype, mean: float, share: float) -> None:
    """What a kernel loses by it is a share of what the dtype's own rounding lost."""
    tokens, width = SHAPES[-1]
    x = (mean + torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)
    nothing = torch.zeros(1, width, device=DEVICE)
    modulation = Modulation(nothing, nothing, EPS)
    truth = modulation.of(x.double())
    lost = share * mean * torch.finfo(dtype).eps / 2
    for rows in (
        norm_modulate(x, modulation, False),
        residual_norm(x, None, None, None, None, modulation, False)[1],
    ):
        assert rows is not None
        rounding = truth.abs() * torch.finfo(dtype).eps
        assert ((rows.values.double() - truth).abs() <= lost * truth.abs().clamp_min(1) + rounding).all()


def test_norm_modulate_without_the_one_is_an_affine_layer_norm() -> None:
    x, weight, bias = draw(7, 384, seed=1), draw(384, seed=2), draw(384, seed=3)
    modulation = Modulation(weight[None], bias[None], EPS, plus=0.0)
    truth = torch.nn.functional.layer_norm(x.double(), (384,), weight.double(), bias.double(), EPS)
    assert_rows(norm_modulate_torch(x, modulation, False), truth)
    assert_twins(norm_modulate(x, modulation, False), norm_modulate_torch(x, modulation, False))


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("entries", [1, 3])
def test_norm_modulate_of_values_that_lack_an_offset(entries: int, codes: bool) -> None:
    tokens, width = SHAPES[-1]
    x, table = draw(tokens, width, seed=1, dtype=torch.bfloat16), draw(entries, 6, width, seed=2)
    offset = 3 * draw(width, seed=3)
    index = index_of(tokens, entries) if entries > 1 else None
    modulation = Modulation(table[:, 1], table[:, 0], EPS, index=index)
    twin = norm_modulate_torch(x, modulation, codes, offset=offset)
    assert_rows(twin, modulation.of(x.double() + offset.double()))
    assert_twins(norm_modulate(x, modulation, codes, offset=offset), twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_residual_norm_without_a_residual_adds_an_offset_to_what_is_there(
    normed: bool, dtype: torch.dtype
) -> None:
    tokens, width = SHAPES[-1]
    y, offset, table = (
        draw(tokens, width, seed=1, dtype=dtype),
        draw(width, seed=2),
        draw(1, 6, width, seed=3),
    )
    after = Modulation(table[:, 4], table[:, 3], EPS) if normed else None
    truth = y.double() + offset.double()
    for into in (None, y.clone()):
        read = y if into is None else into
        total, rows = residual_norm(read, offset, None, None, None, after, True, into=into)
        assert total.dtype == dtype and (into is None or total is into)
        # the interpreter rounds to bf16 by dropping bits
        assert ((total.double() - truth).abs() <= truth.abs() * torch.finfo(dtype).eps + 1e-6).all()
        if after is None:
            assert rows is None
        else:
            assert rows is not None
            assert_twins(rows, written(after.of(total.float()), True, dtype))
    total, _ = residual_norm_torch(y, offset, None, None, None, after, True)
    assert total.dtype == dtype
    assert ((total.double() - truth).abs() <= truth.abs() * torch.finfo(dtype).eps + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [0, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_residual_norm(normed: bool, gated: bool, entries: int, dtype: torch.dtype) -> None:
    tokens, width = SHAPES[-1]
    y, residual = (draw(tokens, width, seed=n, dtype=dtype) for n in (1, 2))
    bias, table = draw(width, seed=3), draw(max(entries, 1), 6, width, seed=4)
    index = index_of(tokens, entries) if entries else None
    gate = table[:, 2] if gated else None
    after = Modulation(table[:, 4], table[:, 3], EPS, index=index) if normed else None
    total, twin = residual_norm_torch(y, bias, gate, residual, index, after, True)
    picked = table.double()[index.long() if index is not None else torch.zeros(tokens, dtype=torch.long)]
    truth = residual.double() + (y.double() + bias.double()) * (picked[:, 2] if gated else 1)
    rounding = torch.finfo(dtype).eps
    assert ((total.double() - truth).abs() <= truth.abs() * rounding + 1e-5 * truth.abs().max()).all()
    for rows in (1, 4):
        into = residual.clone()
        again, result = residual_norm(y, bias, gate, into, index, after, True, into=into, launch=Launch(rows))
        assert again is into
        torch.testing.assert_close(again, total, rtol=2 * rounding, atol=1e-4)
        if after is None:
            assert twin is result is None
        else:  # of what was stored: the interpreter rounds to bf16 by dropping bits
            assert result is not None
            assert_twins(result, written(after.of(again.float()), True, dtype))


def test_residual_norm_mixes_one_gate_with_many_entries_and_the_reverse() -> None:
    y, residual, table = draw(6, 384, seed=1), draw(6, 384, seed=2), draw(3, 6, 384, seed=3)
    index = index_of(6, 3)
    affine = Modulation(table[0, :1], table[0, 1:2], EPS, plus=0.0)
    many = Modulation(table[:, 4], table[:, 3], EPS, index=index)
    for gate, gate_index, after in (
        (table[:, 2], index, affine),
        (None, None, many),
        (table[:1, 2], None, many),
    ):
        expected = residual_norm_torch(y, None, gate, residual, gate_index, after, True)
        given = residual_norm(y, None, gate, residual, gate_index, after, True)
        torch.testing.assert_close(given[0], expected[0])
        assert expected[1] is not None and given[1] is not None
        assert_twins(given[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head"), [(1, 16), (3, 128), *([(40, 128)] if GPU else [])])
@pytest.mark.parametrize("rotate", [True, False])
def test_norm_rope(rotate: bool, heads: int, head: int, dtype: torch.dtype) -> None:
    positions, width = 5, heads * head
    packed = draw(2 * positions, 2 * width, seed=1, dtype=dtype)
    x, bias, weight = packed[:, width:], draw(width, seed=2), draw(width, seed=3)
    angles = draw(positions, head // 2, seed=4)
    table = torch.cat((angles.cos(), angles.sin()), 1) if rotate else None
    wide = x.double() + bias
    truth = wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt() * weight
    if rotate:
        turned = torch.view_as_complex(truth.reshape(2, positions, heads, head // 2, 2))
        turned = turned * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[None, :, None]
        truth = torch.view_as_real(turned).reshape(truth.shape)
    beside = packed[:, :width].clone()
    for rows in (1, 4):
        target = packed.clone()[:, width:]
        norm_rope(target, bias, weight, EPS, table, launch=Launch(rows))
        assert ((target.double() - truth).abs() <= truth.abs() * torch.finfo(dtype).eps + 1e-4).all()
    again = norm_rope_torch(x, bias, weight, EPS, table)
    assert again is x and torch.equal(packed[:, :width], beside)
    torch.testing.assert_close(x, target, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_norm_rope_to_codes_whose_static_scale_no_value_exceeds() -> None:
    heads, head, positions = 3, 128, 5
    x, weight = draw(positions, heads * head, seed=1, dtype=torch.bfloat16), draw(heads * head, seed=2)
    x[0] = 0
    x[0, 200] = 1e4  # all of a row in one value, where RMSNorm gives sqrt(width)
    angles = draw(positions, head // 2, seed=4)
    table = torch.cat((angles.cos(), angles.sin()), 1)
    truth = norm_rope_torch(x.float(), None, weight, EPS, table).double().view(positions, heads, head)
    folded, scale = bounded(weight, heads)
    assert scale.shape == (heads,)
    for function in (norm_rope, norm_rope_torch):
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
        assert function(x.clone(), None, folded, EPS, table, out=codes) is codes
        values = codes.view(positions, heads, head).double() * scale[:, None]
        # 2**-3, not 2**-4: the interpreter cuts where a GPU rounds; and see assert_twins on powers of two.
        allowed = truth.abs() * (0.5 if function is norm_rope and not GPU else 2**-4) + scale[:, None] * 2**-9
        assert values.isfinite().all() and ((values - truth).abs() <= allowed * 1.001).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_quantize_heads(batch: int) -> None:
    packed = draw(batch * 70, 3 * 2 * 16, seed=1, dtype=torch.bfloat16).view(batch, 70, 3 * 2 * 16)
    packed[:, 5, 32:48] = 0
    x = packed[:, :, 32:64].view(batch, 70, 2, 16)
    codes, scale = quantize_heads(x)
    expected, expected_scale = quantize_heads_torch(x)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale, x.float().abs().amax((1, 3)) / 448, rtol=1e-5, atol=0)
    flat = (batch * 70 * 2, 16)
    ones = torch.ones(flat[0], 1, device=DEVICE)
    assert_twins(Rows(codes.view(flat), ones), Rows(expected.view(flat), ones))
    assert quantize_heads(torch.zeros_like(x))[1].eq(1).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_gelu_quantize(tokens: int, width: int, codes: bool) -> None:
    x, bias = draw(tokens, width, seed=1, dtype=torch.bfloat16), draw(width, seed=2)
    x[0] = 60.0  # far out, where the exponential vanishes
    x[1, ::2] = -200.0  # or overflows
    twin = gelu_quantize_torch(x, bias, codes)
    assert_rows(twin, torch.nn.functional.gelu(x.double() + bias.double(), approximate="tanh"))
    for rows in (1, 4):
        assert_twins(gelu_quantize(x, bias, codes, Launch(rows)), twin)


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_attention_output(summed: bool, codes: bool) -> None:
    tokens, width = SHAPES[-1]
    x, bias = draw(tokens, width, seed=1, dtype=torch.bfloat16), draw(width, seed=3)
    other = draw(tokens, width, seed=2, dtype=torch.bfloat16) if summed else None
    twin = attention_output_torch(x, bias, other, codes)
    assert_rows(twin, x.double() + bias.double() + (other.double() if other is not None else 0))
    assert_twins(attention_output(x, bias, other, codes), twin)


def test_a_row_of_zeros_and_no_rows_at_all() -> None:
    zeros = torch.zeros(2, 48, device=DEVICE, dtype=torch.bfloat16)
    coded = attention_output(zeros, None, None, True)
    assert coded.scale is not None
    assert not coded.values.float().any() and torch.equal(coded.scale, torch.ones_like(coded.scale))
    assert gelu_quantize(zeros[:0], None, True).values.shape == (0, 48)
    assert norm_rope(zeros[:0], None, torch.ones(48, device=DEVICE), EPS, None).shape == (0, 48)
