"""The fused kernels as operators of torch, for torch.compile: it traces an operator by its shapes and never enters it.

Eager code calls the kernels themselves, as an operator's dispatch costs more than their launch.
"""

from __future__ import annotations

import torch

from wan_runtime.kernels import attention_output as _attention_output
from wan_runtime.kernels import gelu_quantize as _gelu_quantize
from wan_runtime.kernels import norm_modulate as _norm_modulate
from wan_runtime.kernels import norm_rope as _norm_rope
from wan_runtime.kernels import quantize_heads as _quantize_heads
from wan_runtime.kernels import residual_norm as _residual_norm
from wan_runtime.kernels._codes import Codes
from wan_runtime.kernels._rows import Rows, empty_rows
from wan_runtime.kernels.norm_modulate import Modulation

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Optional = torch.Tensor | None


def _packed(rows: Rows) -> Triple:
    """An operator returns tensors only: what plain rows and one-level scales lack is empty."""
    none = rows.values.new_empty(0, dtype=torch.float32)
    scale, whole = (none.clone() if given is None else given for given in (rows.scale, rows.whole))
    return rows.values, scale, whole


def _rows(packed: Triple, codes: int) -> Rows:
    values, scale, whole = packed
    return Rows(values, scale if codes else None, whole if codes == Codes.NVFP4 else None)


@torch.library.custom_op("wan_runtime::norm_modulate", mutates_args=())
def _norm_modulate_op(
    x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor, eps: float, plus: float, index: Optional, codes: int
) -> Triple:  # fmt: skip
    return _packed(_norm_modulate.norm_modulate(x, Modulation(factor, shift, eps, plus, index), codes))


@_norm_modulate_op.register_fake
def _(
    x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor, eps: float, plus: float, index: Optional, codes: int
) -> Triple:  # fmt: skip
    return _packed(empty_rows(x, codes, x.dtype))


def norm_modulate(x: torch.Tensor, modulation: Modulation, codes: int) -> Rows:
    """See the kernel's module. There is no offset: compiled, no product adds itself to the stream."""
    m = modulation
    return _rows(_norm_modulate_op(x, m.factor, m.shift, m.eps, m.plus, m.index, codes), codes)


@torch.library.custom_op("wan_runtime::residual_norm", mutates_args=())
def _residual_norm_op(
    y: torch.Tensor, bias: Optional, gate: Optional, residual: torch.Tensor, index: Optional, factor: Optional,
    shift: Optional, eps: float, plus: float, entries: Optional, codes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    after = None if factor is None or shift is None else Modulation(factor, shift, eps, plus, entries)
    total, rows = _residual_norm.residual_norm(y, bias, gate, residual, index, after, codes)
    return (total, *_packed(Rows(total.new_empty(0)) if rows is None else rows))


@_residual_norm_op.register_fake
def _(
    y: torch.Tensor, bias: Optional, gate: Optional, residual: torch.Tensor, index: Optional, factor: Optional,
    shift: Optional, eps: float, plus: float, entries: Optional, codes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = Rows(residual.new_empty(0)) if factor is None else empty_rows(residual, codes, residual.dtype)
    return (torch.empty_like(residual), *_packed(rows))


def residual_norm(
    y: torch.Tensor, bias: Optional, gate: Optional, residual: torch.Tensor, index: Optional,
    modulation: Modulation | None, codes: int, *, into: Optional = None,
) -> tuple[torch.Tensor, Rows | None]:  # fmt: skip
    """See the kernel's module. `into` is a compiler's to decide, and not used."""
    m = modulation
    total, values, scale, whole = _residual_norm_op(
        y, bias, gate, residual, index, None if m is None else m.factor, None if m is None else m.shift,
        0.0 if m is None else m.eps, 0.0 if m is None else m.plus, None if m is None else m.index, codes,
    )  # fmt: skip
    return total, None if m is None else _rows((values, scale, whole), codes)


@torch.library.custom_op("wan_runtime::norm_rope", mutates_args=())
def _norm_rope_op(
    x: torch.Tensor, bias: Optional, weight: torch.Tensor, eps: float, table: Optional, codes: bool
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if codes else x.dtype, device=x.device)
    return _norm_rope.norm_rope(x, bias, weight, eps, table, out=out)


@_norm_rope_op.register_fake
def _(
    x: torch.Tensor, bias: Optional, weight: torch.Tensor, eps: float, table: Optional, codes: bool
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn if codes else x.dtype, device=x.device)


def norm_rope(
    x: torch.Tensor, bias: Optional, weight: torch.Tensor, eps: float, table: Optional, out: Optional = None
) -> torch.Tensor:
    """See the kernel's module. `out` says by its dtype whether codes are wanted; the result is a new tensor."""
    result: torch.Tensor = _norm_rope_op(x, bias, weight, eps, table, out is not None)
    return result


@torch.library.custom_op("wan_runtime::gelu_quantize", mutates_args=())
def _gelu_quantize_op(x: torch.Tensor, bias: Optional, codes: int) -> Triple:
    return _packed(_gelu_quantize.gelu_quantize(x, bias, codes))


@_gelu_quantize_op.register_fake
def _(x: torch.Tensor, bias: Optional, codes: int) -> Triple:
    return _packed(empty_rows(x, codes, x.dtype))


def gelu_quantize(x: torch.Tensor, bias: Optional, codes: int) -> Rows:
    """See the kernel's module."""
    return _rows(_gelu_quantize_op(x, bias, codes), codes)


@torch.library.custom_op("wan_runtime::attention_output", mutates_args=())
def _attention_output_op(x: torch.Tensor, bias: Optional, other: Optional, codes: int) -> Triple:
    return _packed(_attention_output.attention_output(x, bias, other, codes))


@_attention_output_op.register_fake
def _(x: torch.Tensor, bias: Optional, other: Optional, codes: int) -> Triple:
    return _packed(empty_rows(x, codes, x.dtype))


def attention_output(x: torch.Tensor, bias: Optional, other: Optional, codes: int) -> Rows:
    """See the kernel's module."""
    return _rows(_attention_output_op(x, bias, other, codes), codes)


@torch.library.custom_op("wan_runtime::quantize_heads", mutates_args=())
def _quantize_heads_op(x: torch.Tensor) -> Pair:
    return _quantize_heads.quantize_heads(x)


@_quantize_heads_op.register_fake
def _(x: torch.Tensor) -> Pair:
    scale = torch.empty(x.shape[0], x.shape[2], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), scale


def quantize_heads(x: torch.Tensor) -> Pair:
    """See the kernel's module."""
    result: Pair = _quantize_heads_op(x)
    return result
