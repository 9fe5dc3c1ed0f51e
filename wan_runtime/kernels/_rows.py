"""What the row kernels share: how rows are read, normalised and written (as FP8 codes with a scale each, or plain).

A row of activations is one token. A kernel reads it once, keeps it in registers in fp32 and writes the result once. A
program works on R rows at once (`Launch.tile`), of which the last may be past the end: `left` says how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wan_runtime.dialects._swizzle import padded, swizzle
from wan_runtime.formats import mxfp8
from wan_runtime.formats._mx import BLOCK
from wan_runtime.kernels._blocks import largest_bits, mxfp8_part
from wan_runtime.kernels._codes import Codes
from wan_runtime.kernels._tiles import column, inside, store_column
from wan_runtime.kernels.quantize_nvfp4 import empty_blocks, quantize_nvfp4, quantize_nvfp4_torch

E4M3_MAX = 448.0
LEAST = 1e-30  # the smallest scale: its reciprocal is still finite in fp32


@dataclass(frozen=True)
class Rows:
    """Activations [tokens, width], as one of `Codes` says.

    PLAIN  values.
    TOKEN  e4m3 codes, scale fp32 [tokens, 1].
    MXFP8  e4m3 codes, scale the e8m0 bytes of their blocks in tile order, as quantize_mxfp8's.
    NVFP4  e2m1 codes, scale the e4m3 bytes of their blocks in tile order, as quantize_nvfp4's, whole fp32 [1].
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    whole: torch.Tensor | None = None

    def dequantised(self) -> torch.Tensor:
        """The values of plain rows or of rows with a scale a token, in fp32."""
        return self.values.float() if self.scale is None else self.values.float() * self.scale


def written(values: torch.Tensor, codes: int, dtype: torch.dtype) -> Rows:
    """The plain-torch twin of `store_rows` and `finished`: fp32 values as Rows, coded or in a dtype."""
    if codes == Codes.PLAIN:
        return Rows(values.to(dtype))
    if codes == Codes.MXFP8:
        slots = mxfp8.quantize(values, True)
        return Rows(slots["payload"].view(torch.float8_e4m3fn), swizzle(slots["block_scale"]))
    if codes == Codes.NVFP4:
        blocks = quantize_nvfp4_torch(values.to(dtype), None)
        return Rows(blocks.payload, blocks.block_scale, blocks.scale)
    amax = values.abs().amax(1, keepdim=True)
    scale = torch.where(amax > 0, (amax / E4M3_MAX).clamp_min(LEAST), torch.ones_like(amax))
    # values / scale may end a rounding above 448, which still rounds to the code 448 (the next step is 32 away).
    return Rows((values * (1.0 / scale)).to(torch.float8_e4m3fn), scale)


def empty_rows(like: torch.Tensor, codes: int, dtype: torch.dtype) -> Rows:
    """Unwritten Rows of the shape of `like` [tokens, width]."""
    if codes == Codes.NVFP4:
        blocks = empty_blocks(like)
        return Rows(blocks.payload, blocks.block_scale, blocks.scale)
    values = torch.empty(like.shape, dtype=torch.float8_e4m3fn if codes else dtype, device=like.device)
    if codes == Codes.MXFP8:
        # Zeros, because a row kernel writes no byte of a tile that has no token or no block.
        tiles = padded(like.shape[0], like.shape[1] // BLOCK)
        return Rows(values, torch.zeros(tiles, dtype=torch.uint8, device=like.device))
    scale = torch.empty(like.shape[0], 1, dtype=torch.float32, device=like.device) if codes else None
    return Rows(values, scale)


def to_write(like: torch.Tensor, codes: int, dtype: torch.dtype) -> Rows:
    """What a row kernel writes of Rows: of NVFP4's, plain values and each token's largest magnitude; see `finished`."""
    if codes != Codes.NVFP4 or not like.shape[0]:
        return empty_rows(like, codes, dtype)
    amax = torch.empty(like.shape[0], 1, dtype=torch.float32, device=like.device)
    return Rows(torch.empty(like.shape, dtype=dtype, device=like.device), amax)


def finished(rows: Rows, codes: int) -> Rows:
    """What a row kernel wrote -> Rows. NVFP4's one scale for all is known only now, and so its codes come after it."""
    if codes != Codes.NVFP4 or not rows.values.shape[0]:
        return rows
    assert rows.scale is not None
    blocks = quantize_nvfp4(rows.values, None, rows.scale.amax())
    return Rows(blocks.payload, blocks.block_scale, blocks.scale)


@triton.jit
def load_part(
    at, stride, left, START: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr
):
    """The COUNT columns from START on of R rows that begin at `at`, `stride` apart: [R, COUNT], 0 where there is no
    row and past a row's end. `at` may also be a column, a place a row, with a stride of 0."""
    columns = START + tl.arange(0, COUNT)
    present = inside(left, columns, START + COUNT <= WIDTH, WIDTH, R)
    return tl.load(at + column(R) * stride + columns[None, :], mask=present, other=0.0)


@triton.jit
def store_part(
    at, stride, left, values, START: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr
):
    """Write what `load_part` reads, in the dtype of `at`."""
    columns = START + tl.arange(0, COUNT)
    present = inside(left, columns, START + COUNT <= WIDTH, WIDTH, R)
    tl.store(at + column(R) * stride + columns[None, :], values.to(at.dtype.element_ty), mask=present)


@triton.jit
def load_rows(at, stride, left, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """R rows in two parts [R, A] and [R, B]; see `load_part` and `Launch`."""
    a = load_part(at, stride, left, 0, A, WIDTH, R)
    b = load_part(at, stride, left, A, B, WIDTH, R)
    return a, b


@triton.jit
def store_plain(
    at, stride, left, a, b, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr
):
    """Write R rows' two parts in the dtype of `at`."""
    store_part(at, stride, left, a, 0, A, WIDTH, R)
    store_part(at, stride, left, b, A, B, WIDTH, R)


@triton.jit
def load_entries(index, left, R: tl.constexpr):
    """Which entry of a table each of R rows takes, a column; 0 where there is no row."""
    if R == 1:
        entries = tl.load(index)
    else:
        rows = tl.arange(0, R)[:, None]
        entries = tl.load(index + rows, mask=rows < left, other=0)
    return entries.to(tl.int64)


@triton.jit
def differ(entries, others, R: tl.constexpr):
    """Whether any row takes another entry."""
    other = entries != others
    if R > 1:
        other = tl.max(other.to(tl.int32)) != 0
    return other


@triton.jit
def load_table(
    table, entries, stride, ONE: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A table's ONE entry for all rows in two parts of one row, or those of a column in two parts of R rows."""
    if ONE:
        a, b = load_rows(table, 0, 1, WIDTH, A, B, 1)
    else:
        a, b = load_rows(table + entries * stride, 0, R, WIDTH, A, B, R)
    return a, b


@triton.jit
def _shares(a, b, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """What threads add up of rows' two parts by themselves [R, B]: one reduction over the program instead of two."""
    return tl.sum(tl.reshape(a, (R, B, A // B)), 2) + b


@triton.jit
def row_sum(a, b, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """The sums of rows' two parts, a column."""
    shares = _shares(a, b, A, B, R)
    return tl.sum(shares) if R == 1 else tl.sum(shares, 1)[:, None]


@triton.jit
def row_max(values, R: tl.constexpr):
    """The largest of each row's values [R, columns], a column."""
    return tl.max(values) if R == 1 else tl.max(values, 1)[:, None]


@triton.jit
def folded(values, COUNT: tl.constexpr, TO: tl.constexpr, R: tl.constexpr):
    """The magnitudes of COUNT values of R rows folded to the largest of TO groups."""
    return tl.max(tl.reshape(tl.abs(values), (R, TO, COUNT // TO)), 2)


@triton.jit
def _added(sum_a, squares_a, sum_b, squares_b):
    return sum_a + sum_b, squares_a + squares_b


@triton.jit
def _moments(a, b, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """The mean and variance of rows' two parts, two columns, by one reduction over the program."""
    sums = _shares(a, b, A, B, R)
    squares = _shares(a * a, b * b, A, B, R)
    if R == 1:
        total, square = tl.reduce((tl.reshape(sums, (B,)), tl.reshape(squares, (B,))), 0, _added)
    else:
        total, square = tl.reduce((sums, squares), 1, _added)
        total = total[:, None]
        square = square[:, None]
    mean = total / WIDTH
    return mean, tl.maximum(square / WIDTH - mean * mean, 0.0)


@triton.jit
def normalise(
    a, b, eps, ROUNDED: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr
):
    """LayerNorm without weights of R rows in fp32; 0 past the end.

    The variance of values that were ROUNDED to 16 bits is their mean square less the square of their mean. What that
    loses grows with the mean: 2e-5 of the variance where the mean is 10 deviations, 2e-3 where it is 100, which is less
    than bf16's rounding of such values lost. That of fp32 values is the mean square of their distances from the mean,
    which takes a second reduction.
    """
    if ROUNDED:
        mean, variance = _moments(a, b, WIDTH, A, B, R)
        scale = tl.rsqrt(variance + eps)
        shift = -mean * scale
        a = a * scale + shift
        b = b * scale + shift
    else:
        mean = row_sum(a, b, A, B, R) / WIDTH
        a = a - mean
        b = b - mean
    if A + B != WIDTH:
        b = tl.where((A + tl.arange(0, B) < WIDTH)[None, :], b, 0.0)
    if not ROUNDED:
        scale = tl.rsqrt(row_sum(a * a, b * b, A, B, R) / WIDTH + eps)
        a = a * scale
        b = b * scale
    return a, b


@triton.jit
def scale_rows(scales, left, amax, E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, R: tl.constexpr):
    """Write the scales of R rows of these largest magnitudes, a column; returns what their values are multiplied by."""
    scale = tl.where(amax > 0, tl.maximum(amax / E4M3_MAX, LEAST), 1.0)
    store_column(scales, left, scale, R)
    return 1.0 / scale


@triton.jit
def stored_bits(values, out, COUNT: tl.constexpr, TO: tl.constexpr, R: tl.constexpr):
    """COUNT values of R rows as they will be stored in `out`, folded to the bits of the largest magnitudes of TO
    groups; NaN's where there is one."""
    rounded = values.to(out.dtype.element_ty).to(tl.float32)
    return largest_bits(tl.reshape(rounded, (R, TO, COUNT // TO)), 2)


@triton.jit
def store_rows(
    a, b, out, scales, row, left, E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write R rows of fp32 values, 0 past the end, as CODES says, one of `Codes`: coded with their scales, or plain."""
    if CODES == 1:
        amax = row_max(tl.maximum(folded(a, A, B, R), tl.abs(b)), R)
        inverse = scale_rows(scales + row, left, amax, E4M3_MAX, LEAST, R)
        a = a * inverse
        b = b * inverse
    elif CODES == 2:
        a = mxfp8_part(a, scales, row, left, 0, A, WIDTH, R)
        b = mxfp8_part(b, scales, row, left, A, B, WIDTH, R)
    elif CODES == 3:
        bits = row_max(tl.maximum(stored_bits(a, out, A, B, R), stored_bits(b, out, B, B, R)), R)
        store_column(scales + row, left, bits.to(tl.float32, bitcast=True), R)
    store_plain(out + row * WIDTH, WIDTH, left, a, b, WIDTH, A, B, R)
