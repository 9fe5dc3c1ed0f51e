"""A row kernel that works on several rows at once gives every row the bits that it has alone, and touches no other row:
by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests.test_kernels import DEVICE, EPS, GPU, draw
from wan_runtime.kernels._codes import Codes
from wan_runtime.kernels._launch import Launch, launch_at
from wan_runtime.kernels._rows import Rows
from wan_runtime.kernels.attention_output import attention_output
from wan_runtime.kernels.gelu_quantize import gelu_quantize
from wan_runtime.kernels.norm_modulate import Modulation, norm_modulate
from wan_runtime.kernels.norm_rope import norm_rope
from wan_runtime.kernels.residual_norm import residual_norm

TOKENS = 11  # of programs of 8 rows: a whole one, and one that ends within its tile
TILES = [(384, 8), (1000, 2)]  # width and rows: two parts that fill a row, and two that do not
Made = list[torch.Tensor]


def assert_same(one: torch.Tensor, many: torch.Tensor) -> None:
    """The same bits; on a GPU, where more threads may share a row and sum it in another order, nearly."""
    if not GPU:
        assert torch.equal(one, many)
    elif one.dtype is torch.uint8:
        apart = (one.int() - many.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02
    else:
        torch.testing.assert_close(one, many, rtol=1.6e-2 if one.dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def parts(rows: Rows) -> Made:
    assert rows.scale is not None
    return [rows.values.view(torch.uint8), rows.scale]


def mixed() -> torch.Tensor:
    """Entries that change between tiles, within one and at a program's first row."""
    return torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 1, 1, 1], dtype=torch.int32, device=DEVICE)


def norms(x: torch.Tensor, how: Launch) -> Made:
    table = draw(3, 6, x.shape[1], seed=2)
    one = Modulation(table[:1, 1], table[:1, 0], EPS)
    many = Modulation(table[:, 1], table[:, 0], EPS, index=mixed())
    plain = norm_modulate(x, one, False, how).values
    return [plain, *parts(norm_modulate(x, one, True, how)), *parts(norm_modulate(x, many, True, how))]


def residuals(x: torch.Tensor, how: Launch) -> Made:
    table, stream = draw(3, 6, x.shape[1], seed=2), draw(*x.shape, seed=3, dtype=x.dtype)
    bias, index = draw(x.shape[1], seed=4), mixed()
    many = Modulation(table[:, 1], table[:, 0], EPS, index=index)
    made: Made = []
    for gate, entries, after in ((table[:, 2], index, many), (table[:1, 2], None, many), (None, None, None)):
        into = stream.clone()
        total, rows = residual_norm(x, bias, gate, into, entries, after, True, into=into, launch=how)
        made += [total, *([] if rows is None else parts(rows))]
    return made


def ropes(x: torch.Tensor, how: Launch) -> Made:
    bias, weight, angles = draw(x.shape[1], seed=2), draw(x.shape[1], seed=3), draw(3, 8, seed=4)
    held = draw(TOKENS + 1, 2 * x.shape[1], seed=5, dtype=x.dtype)
    inner = held[:TOKENS, : x.shape[1]].copy_(x)
    norm_rope(inner, bias, weight, EPS, angles, launch=how)  # three positions: a tile has one of them twice
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    norm_rope(x.clone(), bias, weight, EPS, None, codes, how)
    return [held, codes.view(torch.uint8)]


def gelus(x: torch.Tensor, how: Launch) -> Made:
    bias = draw(x.shape[1], seed=2)
    return [gelu_quantize(x, bias, False, how).values, *parts(gelu_quantize(x, bias, True, how))]


def outputs(x: torch.Tensor, how: Launch) -> Made:
    bias, other = draw(x.shape[1], seed=2), draw(*x.shape, seed=3, dtype=x.dtype)
    return [
        *parts(attention_output(x, bias, other, True, how)),
        *parts(attention_output(x, None, None, True, how)),
    ]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize(("width", "tile"), TILES)
@pytest.mark.parametrize("kernel", [norms, residuals, ropes, gelus, outputs])
def test_a_tile_of_rows_has_the_bits_of_single_rows(
    kernel: Callable[[torch.Tensor, Launch], Made], width: int, tile: int
) -> None:
    x = draw(TOKENS, width, seed=1, dtype=torch.bfloat16)
    x[3] = 0
    alone, together = kernel(x, Launch(8)), kernel(x, Launch(8, tile=tile))
    assert len(alone) == len(together)
    for one, many in zip(alone, together, strict=True):
        assert_same(one, many)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("codes", [Codes.MXFP8, Codes.NVFP4])
def test_a_tile_of_rows_has_the_block_codes_of_single_rows(codes: Codes) -> None:
    x = draw(TOKENS, 416, seed=1, dtype=torch.bfloat16)  # parts that do not fill a row, of whole blocks
    x[3] = 0
    table, bias = draw(3, 6, 416, seed=2), draw(416, seed=3)
    many = Modulation(table[:, 1], table[:, 0], EPS, index=mixed())
    kernels: tuple[Callable[[Launch], Rows | None], ...] = (
        lambda how: norm_modulate(x, many, codes, how),
        lambda how: residual_norm(x, bias, None, x, None, many, codes, launch=how)[1],
        lambda how: gelu_quantize(x, bias, codes, how),
        lambda how: attention_output(x, bias, None, codes, how),
    )
    for make in kernels[2:] if GPU else kernels:  # a GPU may sum a row in another order, which a norm shows
        alone, together = make(Launch(8)), make(Launch(8, tile=4))
        assert alone is not None and together is not None
        for name in ("values", "scale", "whole"):
            one, two = getattr(alone, name), getattr(together, name)
            assert (one is None and two is None) or torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_a_width_takes_the_launch_measured_at_the_next_wider() -> None:
    measured = {1536: Launch(1), 3072: Launch(2), 5120: Launch(3)}
    given = {width: launch_at(measured, width).rows for width in (48, 1536, 1537, 3072, 5120, 13824)}
    assert given == {48: 1, 1536: 1, 1537: 2, 3072: 2, 5120: 3, 13824: 3}


def test_a_tile_counts_against_shared_memory_and_for_warps() -> None:
    one, four = (Launch(warps=8, tile=tile).constants(3072, 4) for tile in (1, 4))
    assert (one["R"], four["R"], one["num_warps"], four["num_warps"]) == (1, 4, 8, 8)
    # 96 KiB hold a row of 12 KiB as often as it is asked for; 4 rows once beside what they pass through, 8 not at all.
    assert (one["STAGES"], four["STAGES"]) == (3, 2)
    assert Launch(tile=8).constants(3072, 4)["STAGES"] == 1
    assert Launch(warps=8, tile=4).constants(256, 2)["num_warps"] == 4
