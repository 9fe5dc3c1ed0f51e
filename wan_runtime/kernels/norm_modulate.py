"""LayerNorm, then a factor and a shift, then per-token FP8 quantisation: one pass.

In:  x [tokens, width] bf16, fp16 or fp32, contiguous; factor and shift [entries, width] fp32 (last dimension
     contiguous), index [tokens] int32: which entry a token takes, or None where all take entry 0.
Out: Rows of LN(x) * (plus + factor) + shift: e4m3 codes and scale [tokens, 1], or plain in x's dtype.

With plus = 1 that is WAN's modulation (scale, shift), with plus = 0 an affine LayerNorm (weight, bias).
Bytes moved: 3 an element from bf16 to codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import (
    E4M3_MAX,
    LEAST,
    Rows,
    empty_rows,
    normalise,
    shape_of,
    store_row,
    written,
)


@dataclass(frozen=True)
class Modulation:
    """LN(x) * (plus + factor) + shift; see the module's docstring."""

    factor: torch.Tensor
    shift: torch.Tensor
    eps: float
    plus: float = 1.0
    index: torch.Tensor | None = None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """fp32 values [tokens, width], normalised and modulated in plain torch."""
        factor, shift = self.factor, self.shift
        if self.index is not None:
            factor, shift = factor[self.index.long()], shift[self.index.long()]
        normal = torch.nn.functional.layer_norm(values, values.shape[1:], eps=self.eps)
        return normal * (self.plus + factor) + shift


def norm_modulate_torch(x: torch.Tensor, modulation: Modulation, codes: bool) -> Rows:
    """The plain-torch twin."""
    return written(modulation.of(x.float()), codes, x.dtype)


@triton.jit
def _norm_modulate(
    x, factor, shift, index, out, scales, tokens, width, stride, eps,
    PLUS: tl.constexpr, SINGLE: tl.constexpr, E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if SINGLE:
        f = tl.load(factor + columns, mask=inside, other=0.0) + PLUS
        s = tl.load(shift + columns, mask=inside, other=0.0)
    for row in range(first, last):
        if not SINGLE:
            entry = tl.load(index + row).to(tl.int64) * stride
            f = tl.load(factor + entry + columns, mask=inside, other=0.0) + PLUS
            s = tl.load(shift + entry + columns, mask=inside, other=0.0)
        values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        values = normalise(values, inside, width, eps) * f + s
        store_row(values, out, scales, row, columns, inside, width, E4M3_MAX, LEAST, CODES)


def norm_modulate(x: torch.Tensor, modulation: Modulation, codes: bool, rows: int = 1) -> Rows:
    """LayerNorm, modulate and quantise each row of x [tokens, width]; see the module's docstring.

    `rows` is how many rows a program takes in turn: it reads a single entry's factor and shift once for all of them.
    """
    tokens, width = x.shape
    result = empty_rows(x, codes, x.dtype)
    m = modulation
    if tokens:
        _norm_modulate[(triton.cdiv(tokens, rows),)](
            x, m.factor, m.shift, m.index, result.values, result.scale, tokens, width, m.factor.stride(0), m.eps,
            PLUS=m.plus, SINGLE=m.index is None, E4M3_MAX=E4M3_MAX, LEAST=LEAST, CODES=codes, ROWS=rows,
            **shape_of(width),
        )  # fmt: skip
    return result
