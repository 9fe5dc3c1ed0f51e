"""A software model of the block-scaled products of `torch.nn.functional.scaled_mm`, for a machine that has none.

`scaled_mm` takes that function's arguments, refuses what its CUDA code refuses, decodes the operands from their bits to
fp64 by the formats' definitions, and multiplies them. It shares nothing with the encoders: no look-up table, no
rounding, no permutation, and scales are read one at a time at the address that cuBLAS's documentation gives for
(row, block).

It is stricter than the hardware in two things, which catch scales in another order: the bytes of a tile beyond the
matrix are 0, and an NVFP4 block scale is not negative.

Sources: OCP Microscaling Formats (MX) 1.0, sections 5.3 (element formats) and 5.4 (E8M0); OCP 8-bit floating point
(E4M3); cuBLAS 13, "1D Block Scaling Factors Layout"; pytorch, aten/src/ATen/native/cuda/ScaledBlas.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.nn.functional import ScalingType, SwizzleType

Array = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float64]]
TILED, PLAIN = SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE


class Refused(ValueError):
    """What the real function would not take, or would multiply wrong."""


@dataclass(frozen=True)
class Kind:
    """One of the two block-scaled products: its dtypes, values a block, and the lists that name it."""

    codes: torch.dtype
    scales: torch.dtype
    block: int
    recipes: tuple[ScalingType, ...]
    orders: tuple[SwizzleType, ...]


NVFP4 = Kind(
    torch.float4_e2m1fn_x2, torch.float8_e4m3fn, 16,
    (ScalingType.BlockWise1x16, ScalingType.TensorWise), (TILED, PLAIN),
)  # fmt: skip
MXFP8 = Kind(torch.float8_e4m3fn, torch.float8_e8m0fnu, 32, (ScalingType.BlockWise1x32,), (TILED,))


def scaled_mm(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    scale_a: torch.Tensor | list[torch.Tensor],
    scale_recipe_a: ScalingType | list[ScalingType],
    scale_b: torch.Tensor | list[torch.Tensor],
    scale_recipe_b: ScalingType | list[ScalingType],
    swizzle_a: SwizzleType | list[SwizzleType] | None = None,
    swizzle_b: SwizzleType | list[SwizzleType] | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    contraction_dim: list[int] | tuple[int, ...] = (),
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """mat_a [M, K] x mat_b [K, N] -> [M, N] in output_dtype, rounded once from fp64."""
    kind = next((kind for kind in (NVFP4, MXFP8) if mat_a.dtype == kind.codes), None)
    if kind is None or mat_b.dtype != kind.codes:
        raise Refused(f"operands of {mat_a.dtype} and {mat_b.dtype}")
    if use_fast_accum:
        raise Refused("use_fast_accum is for FP8 alone, and does nothing for MXFP8")
    if contraction_dim:
        raise Refused("contraction_dim is not modelled")
    if mat_b.stride(0) != 1 or not mat_b.t().is_contiguous():
        raise Refused("mat_b is not column-major")
    a = operand("a", kind, mat_a, _list(scale_a), _list(scale_recipe_a), _list(swizzle_a))
    b = operand("b", kind, mat_b.t(), _list(scale_b), _list(scale_recipe_b), _list(swizzle_b))
    if a.shape[1] != b.shape[1]:
        raise Refused(f"contractions of {a.shape[1]} and {b.shape[1]}")
    if b.shape[0] % 16:
        raise Refused(f"{b.shape[0]} columns of mat_b, not a multiple of 16")
    product = torch.from_numpy(a @ b.T)
    return (product + _bias(bias, b.shape[0], output_dtype)).to(output_dtype)


def operand(
    name: str, kind: Kind, codes: torch.Tensor, scales: Sequence[torch.Tensor], recipes: Sequence[ScalingType],
    orders: Sequence[SwizzleType],
) -> Array:  # fmt: skip
    """The fp64 values [rows, K] of one operand, row-major, with all its scales in."""
    if tuple(recipes) != kind.recipes or tuple(orders) != kind.orders:
        raise Refused(f"{name} has the recipes {recipes} and the orders {orders}")
    if len(scales) != len(kind.recipes):
        raise Refused(f"{name} has {len(scales)} scales")
    if codes.dim() != 2 or not codes.is_contiguous():
        raise Refused(f"{name} is not a row-major matrix")
    if codes.shape[1] % 16:
        raise Refused(f"the rows of {name} take {codes.shape[1]} bytes, not a multiple of 16")
    bytes_ = codes.view(torch.uint8).numpy()
    values = _e2m1_pairs(bytes_) if kind is NVFP4 else _e4m3(bytes_)
    rows, width = values.shape
    blocks = _tiled(name, kind, scales[0], rows, -(-width // kind.block))
    factor = _e4m3(blocks) if kind is NVFP4 else _e8m0(blocks)
    if kind is NVFP4 and bool((blocks > 0x80).any()):
        raise Refused(f"{name} has a negative block scale")
    whole = _whole(name, scales[1]) if kind is NVFP4 else 1.0
    spread = numpy.repeat(factor, kind.block, axis=1)[:, :width]
    return numpy.asarray(values * spread * whole)


def _list(value: object) -> list[Any]:
    """As torch has it: one value stands for a list of it."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(name: str, scale: torch.Tensor) -> float:
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise Refused(f"{name}'s tensor-wise scale is {list(scale.shape)} of {scale.dtype}")
    return float(scale)


def _tiled(name: str, kind: Kind, scales: torch.Tensor, rows: int, blocks: int) -> numpy.ndarray:
    """The scale bytes [rows, blocks], each from its own address in the 128 x 4 tiles."""
    tall, wide = -(-rows // 128) * 128, -(-blocks // 4) * 4
    if scales.dtype != kind.scales or scales.numel() != tall * wide or not scales.is_contiguous():
        raise Refused(
            f"{name}'s block scales are {list(scales.shape)} of {scales.dtype}, not {tall} x {wide}"
        )
    flat = scales.view(torch.uint8).flatten().numpy()
    found = numpy.zeros((tall, wide), dtype=numpy.uint8)
    for row in range(tall):
        for block in range(wide):
            tile = (row // 128) * (wide // 4) + block // 4
            found[row, block] = flat[512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + block % 4]
    if found[rows:].any() or found[:, blocks:].any():
        raise Refused(f"{name}'s block scales are not 0 beyond the matrix: are they in another order?")
    return found[:rows, :blocks]


def _e2m1_pairs(bytes_: numpy.ndarray) -> Array:
    """Two values a byte, the low nibble first: sign, 2 bits of exponent with bias 1, 1 bit of mantissa."""
    nibbles = numpy.stack((bytes_ % 16, bytes_ // 16), axis=-1).reshape(len(bytes_), -1)
    return _float(nibbles, exponent_bits=2, mantissa_bits=1, bias=1)


def _e4m3(bytes_: numpy.ndarray) -> Array:
    """Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; all ones are NaN and there is no infinity."""
    values = _float(bytes_, exponent_bits=4, mantissa_bits=3, bias=7)
    return numpy.where(bytes_ % 128 == 127, numpy.nan, values)


def _e8m0(bytes_: numpy.ndarray) -> Array:
    """2^(byte - 127); 255 is NaN."""
    return numpy.where(bytes_ == 255, numpy.nan, numpy.ldexp(1.0, bytes_.astype(numpy.int64) - 127))


def _float(codes: numpy.ndarray, *, exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """The value that a small floating-point code has by its definition."""
    codes = codes.astype(numpy.int64)
    mantissa = codes % 2**mantissa_bits / 2**mantissa_bits
    exponent = codes // 2**mantissa_bits % 2**exponent_bits
    sign = 1 - 2 * (codes // 2 ** (mantissa_bits + exponent_bits))
    size = numpy.where(
        exponent == 0, numpy.ldexp(mantissa, 1 - bias), numpy.ldexp(1 + mantissa, exponent - bias)
    )
    return numpy.asarray(sign * size)


def _bias(bias: torch.Tensor | None, columns: int, output_dtype: torch.dtype | None) -> torch.Tensor:
    if output_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise Refused(f"an output of {output_dtype}")
    if bias is None:
        return torch.zeros((), dtype=torch.float64)
    if bias.dtype != output_dtype or output_dtype == torch.float32 or bias.shape != (columns,):
        raise Refused(f"a bias {list(bias.shape)} of {bias.dtype} for {columns} columns of {output_dtype}")
    return bias.double()
