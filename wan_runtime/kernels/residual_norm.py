"""The end of a sub-block carried into the start of the next: residual + gate * (y + bias), then LayerNorm, modulate
and quantise what was stored: one pass over both.

In:  y [tokens, width], a product without its bias, bf16, fp16 or fp32, contiguous; bias [width] fp32 or None; gate
     [entries, width] fp32 (last dimension contiguous) or None for 1; residual [tokens, width], contiguous, or None for
     0; index as in norm_modulate; the next norm's Modulation, or None to end there.
Out: the sum [tokens, width] in the residual's dtype (y's without one), and Rows of its normalised values.

Bytes moved: 7 an element to FP8 or MXFP8 codes (y and the residual read, the sum and the codes written), against 11 in
three passes; 10.56 to NVFP4, which takes a second pass. Without a residual 2 fewer.
"""

from __future__ import annotations

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
    store_plain,
    store_rows,
    to_write,
    written,
)
from wan_runtime.kernels.norm_modulate import Modulation

LAUNCHES = {3072: Launch(rows=8), 5120: Launch(rows=32, stages=4)}
OFFSET_LAUNCHES = {  # without a residual
    1536: Launch(rows=8, warps=2, registers=128),
    3072: Launch(rows=8, stages=4),
    5120: Launch(warps=8, stages=4),
}
PLAIN_LAUNCHES = {  # without a norm there is little to do but wait for memory
    1536: Launch(rows=4),
    3072: Launch(rows=8, warps=8, tile=4),
    5120: Launch(rows=4),
}


def residual_norm_torch(
    y: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, residual: torch.Tensor | None,
    index: torch.Tensor | None, modulation: Modulation | None, codes: int, *, into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Rows | None]:  # fmt: skip
    """The plain-torch twin."""
    values = y.float() if bias is None else y.float() + bias
    if gate is not None:
        values = values * (gate if index is None else gate[index.long()])
    total = values.to(y.dtype) if residual is None else (residual.float() + values).to(residual.dtype)
    total = total if into is None else into.copy_(total)
    if modulation is None:
        return total, None
    return total, written(modulation.of(total.float()), codes, total.dtype)


@triton.jit
def _residual_norm(
    y, bias, gate, residual, total, index, factor, shift, out, scales, tokens, rows, gate_stride, stride, eps,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, NORM: tl.constexpr, PLUS: tl.constexpr,
    ONE_GATE: tl.constexpr, ONE_ENTRY: tl.constexpr,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, CODES: tl.constexpr,
    WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows
    last = tl.minimum(first + rows, tokens)
    taken = first
    if not (ONE_GATE and ONE_ENTRY):
        taken = load_entries(index + first, last - first, R)
    if HAS_BIAS:
        bias_a, bias_b = load_rows(bias, 0, 1, WIDTH, A, B, 1)
    if GATED:
        gate_a, gate_b = load_table(gate, taken, gate_stride, ONE_GATE, WIDTH, A, B, R)
    if NORM:
        factor_a, factor_b = load_table(factor, taken, stride, ONE_ENTRY, WIDTH, A, B, R)
        shift_a, shift_b = load_table(shift, taken, stride, ONE_ENTRY, WIDTH, A, B, R)
    for row in tl.range(first, last, R, num_stages=STAGES):
        left = last - row
        a, b = load_rows(y + row * WIDTH, WIDTH, left, WIDTH, A, B, R)
        if ADDED:
            stream_a, stream_b = load_rows(residual + row * WIDTH, WIDTH, left, WIDTH, A, B, R)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if not (ONE_GATE and ONE_ENTRY):
            entries = load_entries(index + row, left, R)
            if differ(entries, taken, R):
                taken = entries
                if GATED and not ONE_GATE:
                    gate_a, gate_b = load_table(gate, taken, gate_stride, ONE_GATE, WIDTH, A, B, R)
                if NORM and not ONE_ENTRY:
                    factor_a, factor_b = load_table(factor, taken, stride, ONE_ENTRY, WIDTH, A, B, R)
                    shift_a, shift_b = load_table(shift, taken, stride, ONE_ENTRY, WIDTH, A, B, R)
        if HAS_BIAS:
            a += bias_a
            b += bias_b
        if GATED:
            a *= gate_a
            b *= gate_b
        if ADDED:
            a += stream_a.to(tl.float32)
            b += stream_b.to(tl.float32)
        a = a.to(total.dtype.element_ty)
        b = b.to(total.dtype.element_ty)
        store_plain(total + row * WIDTH, WIDTH, left, a, b, WIDTH, A, B, R)
        if NORM:
            rounded: tl.constexpr = total.dtype.element_ty.primitive_bitwidth == 16
            normal_a, normal_b = normalise(a.to(tl.float32), b.to(tl.float32), eps, rounded, WIDTH, A, B, R)
            normal_a = normal_a * (factor_a + PLUS) + shift_a
            normal_b = normal_b * (factor_b + PLUS) + shift_b
            store_rows(normal_a, normal_b, out, scales, row, left, E4M3_MAX, LEAST, CODES, WIDTH, A, B, R)


def residual_norm(
    y: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, residual: torch.Tensor | None,
    index: torch.Tensor | None, modulation: Modulation | None, codes: int, *, into: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, Rows | None]:  # fmt: skip
    """residual + gate * (y + bias), and what the next norm makes of it; see the module's docstring.

    `index` is the gate's; the Modulation has its own, the same tensor or None. `into` takes the sum: it may be the
    residual itself, or y.
    """
    tokens, width = y.shape
    total = torch.empty_like(y if residual is None else residual) if into is None else into
    m = modulation
    result = None if m is None else to_write(total, codes, total.dtype)
    if tokens:
        measured = PLAIN_LAUNCHES if m is None else OFFSET_LAUNCHES if residual is None else LAUNCHES
        launch = launch or launch_at(measured, width)
        _residual_norm[launch.grid(tokens)](
            y, bias, gate, residual, total, index if m is None or m.index is None else m.index,
            None if m is None else m.factor, None if m is None else m.shift,
            None if result is None else result.values, None if result is None else result.scale,
            tokens, launch.rows, 0 if gate is None else gate.stride(0), 0 if m is None else m.factor.stride(0),
            0.0 if m is None else m.eps,
            HAS_BIAS=bias is not None, GATED=gate is not None, ADDED=residual is not None, NORM=m is not None,
            PLUS=0.0 if m is None else m.plus,
            ONE_GATE=gate is None or index is None, ONE_ENTRY=m is None or m.index is None,
            E4M3_MAX=E4M3_MAX, LEAST=LEAST, CODES=int(codes),
            **launch.constants(width, y.itemsize + (0 if residual is None else residual.itemsize)),
        )  # fmt: skip
    return total, None if result is None else finished(result, codes)
