"""What the row kernels share: how a row is read, normalised and written (as FP8 codes with its scale, or plain), and
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
SHARED = 96 * 1024  # bytes of shared memory that a program has on every GPU with FP8 products


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
def load_row(at, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The WIDTH values at `at` in two parts, A and up to B of them, 0 past the end; see `Launch`."""
    columns = A + tl.arange(0, B)
    a = tl.load(at + tl.arange(0, A))
    if A + B == WIDTH:  # noqa: SIM108 - Triton's if
        b = tl.load(at + columns)
    else:
        b = tl.load(at + columns, mask=columns < WIDTH, other=0.0)
    return a, b


@triton.jit
def store_plain(at, a, b, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Write a row's two parts in the dtype of `at`."""
    columns = A + tl.arange(0, B)
    tl.store(at + tl.arange(0, A), a.to(at.dtype.element_ty))
    if A + B == WIDTH:
        tl.store(at + columns, b.to(at.dtype.element_ty))
    else:
        tl.store(at + columns, b.to(at.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def row_sum(a, b, A: tl.constexpr, B: tl.constexpr):
    """The sum of a row's two parts, the threads' own shares first: one reduction over the program instead of two."""
    return tl.sum(tl.sum(tl.reshape(a, (B, A // B)), 1) + b, 0)


@triton.jit
def row_amax(a, b, A: tl.constexpr, B: tl.constexpr):
    """The largest magnitude of a row's two parts."""
    return tl.max(tl.maximum(tl.max(tl.reshape(tl.abs(a), (B, A // B)), 1), tl.abs(b)), 0)


@triton.jit
def normalise(a, b, eps, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """LayerNorm without weights of one row in fp32; 0 past the end."""
    mean = row_sum(a, b, A, B) / WIDTH
    a = a - mean
    b = b - mean
    if A + B != WIDTH:
        b = tl.where(A + tl.arange(0, B) < WIDTH, b, 0.0)
    scale = tl.rsqrt(row_sum(a * a, b * b, A, B) / WIDTH + eps)
    return a * scale, b * scale


@triton.jit
def store_row(
    a, b, out, scales, row, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Write one row of fp32 values, 0 past the end, as codes and their scale or as they are."""
    if CODES:
        amax = row_amax(a, b, A, B)
        scale = tl.where(amax > 0, tl.maximum(amax / E4M3_MAX, LEAST), 1.0)
        tl.store(scales + row, scale)
        a = a * (1.0 / scale)
        b = b * (1.0 / scale)
    store_plain(out + row * WIDTH, a, b, WIDTH, A, B)


@dataclass(frozen=True)
class Launch:
    """How a row kernel is launched: nothing of it changes a result.

    rows       tokens a program takes, one after the other; what every row needs (biases, modulation) is read once and
               kept in registers.
    warps      a program's, at most: rows that are short take fewer.
    stages     rows that are on their way from memory at a time, in shared memory and not in registers; fewer where they
               would not fit.
    registers  the most a thread may hold, or None for the compiler's choice; fewer let more programs run side by side.
    """

    rows: int = 16
    warps: int = 4
    stages: int = 3
    registers: int | None = None

    def grid(self, tokens: int) -> tuple[int]:
        """The programs for so many tokens."""
        return (triton.cdiv(tokens, self.rows),)

    def constants(self, width: int, read: int) -> dict[str, int | None]:
        """What a kernel is compiled for, of rows for which `read` bytes an element are read.

        A row is held in two parts, powers of two as Triton wants them: 5120 is 4096 and 1024, where one part would be
        8192 and do 1.6 times the work.
        """
        a, rest = first_part(width)
        return self._constants(width, read, {"A": a, "B": triton.next_power_of_2(rest)})

    def constants_of_three(self, width: int, read: int) -> dict[str, int | None]:
        """The same in three parts, for wide rows that do much with each value: 13824 is 8192, 4096 and 2048."""
        a, rest = first_part(width)
        b, rest = first_part(rest)
        return self._constants(width, read, {"A": a, "B": b, "C": triton.next_power_of_2(rest)})

    def _constants(self, width: int, read: int, parts: dict[str, int]) -> dict[str, int | None]:
        ahead = SHARED // (sum(parts.values()) * read)  # rows; the one that is worked on is in registers
        warps = max(triton.next_power_of_2(width) // 256, 1)
        return {
            **parts,
            "WIDTH": width,
            "STAGES": min(ahead + 1, self.stages),
            "num_warps": min(warps, self.warps),
            "maxnreg": self.registers,
        }


def first_part(width: int) -> tuple[int, int]:
    """The largest power of two below a width of at least 2, and what is left."""
    part = 1 << ((width - 1).bit_length() - 1)
    return part, width - part
