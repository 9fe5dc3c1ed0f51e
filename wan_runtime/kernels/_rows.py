"""What the row kernels share: how a row is normalised, how it is written (as FP8 codes with its scale, or plain), and
how a launch is shaped.

A row of activations is one token. A kernel reads it once, keeps it in registers in fp32 and writes the result once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0
LEAST = 1e-30  # the smallest scale: its reciprocal is still finite in fp32


@dataclass(frozen=True)
class Rows:
    """Activations [tokens, width]: plain values, or e4m3 codes with one fp32 scale a token [tokens, 1]."""

    values: torch.Tensor
    scale: torch.Tensor | None = None

    def dequantised(self) -> torch.Tensor:
        """The values in fp32."""
        return self.values.float() if self.scale is None else self.values.float() * self.scale


def written(values: torch.Tensor, codes: bool, dtype: torch.dtype) -> Rows:
    """The plain-torch twin of `store_row`: fp32 values as Rows, coded or in a dtype."""
    if not codes:
        return Rows(values.to(dtype))
    amax = values.abs().amax(1, keepdim=True)
    scale = torch.where(amax > 0, (amax / E4M3_MAX).clamp_min(LEAST), torch.ones_like(amax))
    # values / scale may end a rounding above 448, which still rounds to the code 448 (the next step is 32 away).
    return Rows((values * (1.0 / scale)).to(torch.float8_e4m3fn), scale)


def empty_rows(like: torch.Tensor, codes: bool, dtype: torch.dtype) -> Rows:
    """Unwritten Rows of the shape of `like` [tokens, width]."""
    values = torch.empty(like.shape, dtype=torch.float8_e4m3fn if codes else dtype, device=like.device)
    scale = torch.empty(like.shape[0], 1, dtype=torch.float32, device=like.device) if codes else None
    return Rows(values, scale)


@triton.jit
def normalise(values, inside, width, eps):
    """LayerNorm without weights of one row in registers; 0 outside."""
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    return centred * tl.rsqrt(variance + eps)


@triton.jit
def store_row(
    values, out, scales, row, columns, inside, width,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Write one row; `values` must be 0 outside."""
    if CODES:
        amax = tl.max(tl.abs(values), 0)
        scale = tl.where(amax > 0, tl.maximum(amax / E4M3_MAX, LEAST), 1.0)
        values = values * (1.0 / scale)
        tl.store(scales + row, scale)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


def shape_of(width: int, per_warp: int = 512) -> dict[str, int]:
    """BLOCK and num_warps for rows of a width: `per_warp` elements a warp."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // per_warp, 1), 16)}
