"""The end of a sub-block carried into the start of the next: residual + gate * (y + bias), then LayerNorm, modulate
and quantise what was stored: one pass over both.

In:  y [tokens, width], a product without its bias, bf16, fp16 or fp32, contiguous; bias [width] fp32 or None; gate
     [entries, width] fp32 (last dimension contiguous) or None for 1; residual [tokens, width], contiguous; index as
     in norm_modulate; the next norm's Modulation, or None to end there.
Out: the sum [tokens, width] in the residual's dtype, and Rows of its normalised values.

Bytes moved: 7 an element (y and the residual read, the sum and the codes written), against 11 in three passes.
"""

from __future__ import annotations

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
from wan_runtime.kernels.norm_modulate import Modulation


def residual_norm_torch(
    y: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, residual: torch.Tensor,
    index: torch.Tensor | None, modulation: Modulation | None, codes: bool, *, into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Rows | None]:  # fmt: skip
    """The plain-torch twin."""
    values = y.float() if bias is None else y.float() + bias
    if gate is not None:
        values = values * (gate if index is None else gate[index.long()])
    total = (residual.float() + values).to(residual.dtype)
    total = total if into is None else into.copy_(total)
    if modulation is None:
        return total, None
    return total, written(modulation.of(total.float()), codes, residual.dtype)


@triton.jit
def _residual_norm(
    y, bias, gate, residual, total, index, factor, shift, out, scales, tokens, width, gate_stride, stride, eps,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr,
    ONE_GATE: tl.constexpr, ONE_ENTRY: tl.constexpr,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0)
    if GATED and ONE_GATE:
        g = tl.load(gate + columns, mask=inside, other=0.0)
    if NORM and ONE_ENTRY:
        f = tl.load(factor + columns, mask=inside, other=0.0) + PLUS
        s = tl.load(shift + columns, mask=inside, other=0.0)
    for row in range(first, last):
        at = row * width + columns
        values = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if not (ONE_GATE and ONE_ENTRY):
            entry = tl.load(index + row).to(tl.int64)
        if HAS_BIAS:
            values += b
        if GATED:
            if not ONE_GATE:
                g = tl.load(gate + entry * gate_stride + columns, mask=inside, other=0.0)
            values *= g
        stored = (before + values).to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=inside)
        if NORM:
            if not ONE_ENTRY:
                f = tl.load(factor + entry * stride + columns, mask=inside, other=0.0) + PLUS
                s = tl.load(shift + entry * stride + columns, mask=inside, other=0.0)
            normal = normalise(stored.to(tl.float32), inside, width, eps) * f + s
            store_row(normal, out, scales, row, columns, inside, width, E4M3_MAX, LEAST, CODES)


def residual_norm(
    y: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, residual: torch.Tensor,
    index: torch.Tensor | None, modulation: Modulation | None, codes: bool, *, into: torch.Tensor | None = None,
    rows: int = 1,
) -> tuple[torch.Tensor, Rows | None]:  # fmt: skip
    """residual + gate * (y + bias), and what the next norm makes of it; see the module's docstring.

    `index` is the gate's; the Modulation has its own, the same tensor or None. `into` takes the sum: it may be the
    residual itself.
    """
    tokens, width = y.shape
    total = torch.empty_like(residual) if into is None else into
    m = modulation
    result = None if m is None else empty_rows(residual, codes, residual.dtype)
    if tokens:
        _residual_norm[(triton.cdiv(tokens, rows),)](
            y, bias, gate, residual, total, index if m is None or m.index is None else m.index,
            None if m is None else m.factor, None if m is None else m.shift,
            None if result is None else result.values, None if result is None else result.scale,
            tokens, width, 0 if gate is None else gate.stride(0), 0 if m is None else m.factor.stride(0),
            0.0 if m is None else m.eps,
            HAS_BIAS=bias is not None, GATED=gate is not None, NORM=m is not None, PLUS=0.0 if m is None else m.plus,
            ONE_GATE=gate is None or index is None, ONE_ENTRY=m is None or m.index is None,
            E4M3_MAX=E4M3_MAX, LEAST=LEAST, CODES=codes, ROWS=rows, **shape_of(width),
        )  # fmt: skip
    return total, result
