"""LayerNorm, then a factor and a shift, then quantisation for the next product: one pass.

In:  x [tokens, width] bf16, fp16 or fp32, contiguous; factor and shift [entries, width] fp32 (last dimension
     contiguous), index [tokens] int32: which entry a token takes, or None where all take entry 0; offset [width] fp32,
     added to each row of x first, or None.
Out: Rows of LN(x + offset) * (plus + factor) + shift in `codes`; plain ones in x's dtype.

With plus = 1 that is WAN's modulation (scale, shift), with plus = 0 an affine LayerNorm (weight, bias).
Bytes moved, an element from bf16: 3 to FP8 codes, 3.03 to MXFP8, 6.56 to NVFP4, which takes a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._launch import Launch, launch_at
from wan_runtime.kernels._rows import (
    E4M3_MAX,
    LEAST,
    Rows,
    differ,
    finished,
    load_entries,
    load_rows,
    load_table,
    normalise,
    store_rows,
    to_write,
    written,
)

LAUNCHES = {
    1536: Launch(rows=32, warps=2),
    3072: Launch(rows=8, stages=4),
    5120: Launch(warps=8, stages=4, registers=80),
}
OFFSET_LAUNCHES = {  # one more vector in registers
    1536: Launch(rows=32, warps=2),
    3072: Launch(),
    5120: Launch(warps=8),
}


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


def norm_modulate_torch(
    x: torch.Tensor, modulation: Modulation, codes: int, *, offset: torch.Tensor | None = None
) -> Rows:
    """The plain-torch twin."""
    values = x.float() if offset is None else x.float() + offset
    return written(modulation.of(values), codes, x.dtype)


@triton.jit
def _norm_modulate(
    x, offset, factor, shift, index, out, scales, tokens, rows, stride, eps,
    HAS_OFFSET: tl.constexpr, PLUS: tl.constexpr, SINGLE: tl.constexpr,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    taken = first
    if not SINGLE:
        taken = load_entries(index + first, last - first, R)
    factor_a, factor_b = load_table(factor, taken, stride, SINGLE, WIDTH, A, B, R)
    shift_a, shift_b = load_table(shift, taken, stride, SINGLE, WIDTH, A, B, R)
    if HAS_OFFSET:
        offset_a, offset_b = load_rows(offset, 0, 1, WIDTH, A, B, 1)
    for row in tl.range(first, last, R, num_stages=STAGES):
        left = last - row
        a, b = load_rows(x + row * WIDTH, WIDTH, left, WIDTH, A, B, R)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if HAS_OFFSET:
            a += offset_a
            b += offset_b
        if not SINGLE:
            entries = load_entries(index + row, left, R)
            if differ(entries, taken, R):
                taken = entries
                factor_a, factor_b = load_table(factor, taken, stride, SINGLE, WIDTH, A, B, R)
                shift_a, shift_b = load_table(shift, taken, stride, SINGLE, WIDTH, A, B, R)
        a, b = normalise(a, b, eps, x.dtype.element_ty.primitive_bitwidth == 16, WIDTH, A, B, R)
        a = a * (factor_a + PLUS) + shift_a
        b = b * (factor_b + PLUS) + shift_b
        store_rows(a, b, out, scales, row, left, E4M3_MAX, LEAST, CODES, WIDTH, A, B, R)


def norm_modulate(
    x: torch.Tensor, modulation: Modulation, codes: int, launch: Launch | None = None, *,
    offset: torch.Tensor | None = None,
) -> Rows:  # fmt: skip
    """LayerNorm, modulate and quantise each row of x [tokens, width]; see the module's docstring."""
    tokens, width = x.shape
    result = to_write(x, codes, x.dtype)
    m = modulation
    if tokens:
        launch = launch or launch_at(LAUNCHES if offset is None else OFFSET_LAUNCHES, width)
        _norm_modulate[launch.grid(tokens)](
            x, offset, m.factor, m.shift, m.index, result.values, result.scale, tokens, launch.rows, m.factor.stride(0),
            m.eps, HAS_OFFSET=offset is not None, PLUS=m.plus, SINGLE=m.index is None, E4M3_MAX=E4M3_MAX, LEAST=LEAST,
            CODES=int(codes), **launch.constants(width, x.itemsize),
        )  # fmt: skip
    return finished(result, codes)
