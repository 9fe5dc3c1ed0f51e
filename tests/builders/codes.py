"""The number formats, from their bit fields in fp64: tables of values, nearest codes, packing and tile order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def _e5m2(code: int) -> float:
    exponent, mantissa = code >> 2 & 31, code & 3
    if exponent == 31:
        return float("inf") if mantissa == 0 else float("nan")
    return mantissa / 4 * 2.0**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15)


def _e2m1(code: int) -> float:
    exponent, mantissa = code >> 1 & 3, code & 1
    return mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)


def _e3m2(code: int) -> float:
    exponent, mantissa = code >> 2 & 7, code & 3
    return mantissa / 4 * 2.0**-2 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 3)


def _table(magnitude: Callable[[int], float], codes: int) -> Floats:
    """Value of each code; the upper half of the codes is the lower half negated."""
    half = [magnitude(code) for code in range(codes // 2)]
    return np.array(half + [-value for value in half])


E4M3 = _table(_e4m3, 256)
E5M2 = _table(_e5m2, 256)
E3M2 = _table(_e3m2, 64)
E2M1 = _table(_e2m1, 16)
E8M0 = np.array([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")])
INT8 = np.array([*range(128), *range(-128, 0)], dtype=np.float64)


def nearest(values: Floats, table: Floats) -> Bytes:
    """The code nearest to each value; of two equally near, the even one; beyond the largest finite one, that one."""
    half = table[: len(table) // 2]
    magnitudes = half[np.isfinite(half)]
    size = np.abs(values)
    above = np.clip(np.searchsorted(magnitudes, size), 1, len(magnitudes) - 1)
    low, high = size - magnitudes[above - 1], magnitudes[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    return np.asarray(code + np.signbit(values) * (len(table) // 2), dtype=np.uint8)


def pack(codes: Bytes, *, even_high: bool) -> Bytes:
    """4-bit codes [out, in] -> bytes [out, in / 2]; `even_high` puts the even element in the high nibble."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return np.asarray(even * 16 + odd if even_high else odd * 16 + even, dtype=np.uint8)


def pack6(codes: Bytes) -> Bytes:
    """6-bit codes [out, in] -> bytes [out, 3 * in / 4]: one long little-endian number a row, 6 bits a code."""
    rows = [sum(int(code) << 6 * place for place, code in enumerate(row)) for row in codes]
    size = codes.shape[1] * 6 // 8
    return np.array([list(row.to_bytes(size, "little")) for row in rows], dtype=np.uint8)


def tile_order(scales: Bytes) -> Bytes:
    """Block scales [rows, cols] -> padded to multiples of 128 x 4, each at its byte in the 128 x 4 tile order."""
    rows, cols = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    tiled = np.zeros(rows * cols, dtype=np.uint8)
    for row in range(scales.shape[0]):
        for col in range(scales.shape[1]):
            tile = (row // 128) * (cols // 4) + col // 4
            tiled[tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4] = scales[row, col]
    return tiled.reshape(rows, cols)
