"""What the row kernels share: how a row is read, normalised and written (as FP8 codes with its scale, or plain), and
how a launch is shaped.

A row of activations is one token. A kernel reads it once, keeps it in registers in fp32 and writes the result once.
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
from wan_runtime.kernels.quantize_nvfp4 import empty_blocks, quantize_nvfp4, quantize_nvfp4_torch

E4M3_MAX = 448.0
LEAST = 1e-30  # the smallest scale: its reciprocal is still finite in fp32
SHARED = 96 * 1024  # bytes of shared memory that a program has on every GPU with FP8 products


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
    """The plain-torch twin of `store_row` and `finished`: fp32 values as Rows, coded or in a dtype."""
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
def store_amax(a, b, out, amaxes, row, A: tl.constexpr, B: tl.constexpr):
    """Write the largest magnitude of a row's two parts as they will be stored in `out`; NaN where there is one."""
    first = largest_bits(tl.reshape(a.to(out.dtype.element_ty).to(tl.float32), (B, A // B)), 1)
    second = b.to(out.dtype.element_ty).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(amaxes + row, tl.max(tl.maximum(first, second), 0).to(tl.float32, bitcast=True))


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
    """Write one row of fp32 values, 0 past the end, as CODES says, one of `Codes`: coded with their scale, or plain."""
    if CODES == 1:
        amax = row_amax(a, b, A, B)
        scale = tl.where(amax > 0, tl.maximum(amax / E4M3_MAX, LEAST), 1.0)
        tl.store(scales + row, scale)
        a = a * (1.0 / scale)
        b = b * (1.0 / scale)
    elif CODES == 2:
        a = mxfp8_part(a, scales, row, 0, A, WIDTH)
        b = mxfp8_part(b, scales, row, A, B, WIDTH)
    elif CODES == 3:
        store_amax(a, b, out, scales, row, A, B)
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
        return self._constants(width, read, {"A": a, "B": triton.next_power_of_2(rest or BLOCK)})

    def constants_of_three(self, width: int, read: int) -> dict[str, int | None]:
        """The same in three parts, for wide rows that do much with each value: 13824 is 8192, 4096 and 2048."""
        a, rest = first_part(width) if width > BLOCK else (width // 2, width // 2)
        b, rest = first_part(rest)
        return self._constants(width, read, {"A": a, "B": b, "C": triton.next_power_of_2(rest or BLOCK)})

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
    """The largest power of two below a width of at least 2, and what is left; one block of 32 stays whole."""
    if width == BLOCK:
        return width, 0
    part = 1 << ((width - 1).bit_length() - 1)
    return part, width - part
