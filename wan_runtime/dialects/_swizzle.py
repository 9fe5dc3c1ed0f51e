"""The 128 x 4 tile order that cuBLAS wants block scales in (Comfy, LightX2V); plain row-major is the canonical order.

Scale (r, c) of a matrix padded to R x C, R a multiple of 128 and C of 4, lies at byte
(r // 128) * (C / 4) * 512 + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4.
Source: cuBLAS documentation, "1D Block Scaling Factors Layout".
"""

from __future__ import annotations

import torch


def padded(rows: int, cols: int) -> tuple[int, int]:
    """Rows rounded up to 128, columns to 4."""
    return -(-rows // 128) * 128, -(-cols // 4) * 4


def swizzle(plain: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, cols] row-major -> uint8 [padded rows, padded cols] in tile order; the padding is zero."""
    rows, cols = plain.shape
    full_rows, full_cols = padded(rows, cols)
    full = plain
    if (rows, cols) != (full_rows, full_cols):
        full = torch.nn.functional.pad(plain, (0, full_cols - cols, 0, full_rows - rows))
    tiles = full.reshape(full_rows // 128, 4, 32, full_cols // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(full_rows, full_cols)


def unswizzle(tiled: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """uint8 in tile order -> uint8 [rows, cols] row-major; raises ValueError when the size is not the padded one."""
    full_rows, full_cols = padded(rows, cols)
    if tuple(tiled.shape) != (full_rows, full_cols):
        raise ValueError(
            f"swizzled block scales of a {rows} x {cols} grid take {full_rows} x {full_cols} bytes; the file has "
            f"shape {list(tiled.shape)}."
        )
    tiles = tiled.reshape(full_rows // 128, full_cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(full_rows, full_cols)[:rows, :cols].contiguous()
