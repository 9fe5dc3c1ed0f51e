"""Quantisation of q, k or v for FP8 attention, with one scale a head: two passes, as a head's amax spans all tokens.

In:  x [batch, tokens, heads, head] bf16, fp16 or fp32, every token's heads contiguous (head a power of two).
Out: codes [batch, tokens, heads, head] float8_e4m3fn, contiguous; scale [batch, heads] fp32; x ~ codes * scale.
Bytes moved: 5 an element from bf16. q and k need no such pass in a fused block: see norm_rope.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wan_runtime.kernels._rows import E4M3_MAX, LEAST

TOKENS = 64  # a program's


def quantize_heads_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain-torch twin."""
    amax = x.float().abs().amax((1, 3))
    scale = torch.where(amax > 0, (amax / E4M3_MAX).clamp_min(LEAST), torch.ones_like(amax))
    return (x.float() * (1.0 / scale)[:, None, :, None]).to(torch.float8_e4m3fn), scale


@triton.jit
def _amax_heads(x, amax, tokens, heads, stride, HEAD: tl.constexpr, TOKENS: tl.constexpr):
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = (batch * tokens + rows[:, None]) * stride + head * HEAD + tl.arange(0, HEAD)[None, :]
    values = tl.load(x + at, mask=(rows < tokens)[:, None], other=0.0).to(tl.float32)
    tl.atomic_max(amax + batch * heads + head, tl.max(tl.max(tl.abs(values), 1), 0))


@triton.jit
def _quantize_heads(
    x, amax, codes, scales, tokens, heads, stride,
    E4M3_MAX: tl.constexpr, LEAST: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    largest = tl.load(amax + batch * heads + head)
    scale = tl.where(largest > 0, tl.maximum(largest / E4M3_MAX, LEAST), 1.0)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (rows < tokens)[:, None]
    columns = head * HEAD + tl.arange(0, HEAD)[None, :]
    values = tl.load(x + (batch * tokens + rows[:, None]) * stride + columns, mask=inside, other=0.0)
    scaled = values.to(tl.float32) * (1.0 / scale)
    at = (batch * tokens + rows[:, None]) * (heads * HEAD) + columns
    tl.store(codes + at, scaled.to(codes.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(scales + batch * heads + head, scale)


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [batch, tokens, heads, head] to e4m3 with a scale a head; see the module's docstring."""
    batch, tokens, heads, head = x.shape
    if x.stride() != (tokens * x.stride(1), x.stride(1), head, 1):
        x = x.contiguous()
    amax = torch.zeros(batch, heads, dtype=torch.float32, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty_like(amax)
    grid = (triton.cdiv(tokens, TOKENS), batch, heads)
    _amax_heads[grid](x, amax, tokens, heads, x.stride(1), HEAD=head, TOKENS=TOKENS)
    _quantize_heads[grid](
        x,
        amax,
        codes,
        scale,
        tokens,
        heads,
        x.stride(1),
        E4M3_MAX=E4M3_MAX,
        LEAST=LEAST,
        HEAD=head,
        TOKENS=TOKENS,
    )
    return codes, scale
