"""Per-token FP8 quantisation of activations: one pass that reads a row, finds its amax and writes its codes.

In:  x [tokens, width] bf16, fp16 or fp32, rows contiguous.
Out: codes [tokens, width] float8_e4m3fn, scale [tokens, 1] fp32; x ~ codes * scale, scale = amax / 448 (1 for zeros).
Bytes moved: 3 an element from bf16, against about 17 for the same arithmetic in eager torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0


def quantize_rows_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain-torch twin."""
    values = x.float()
    amax = values.abs().amax(1, keepdim=True)
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    return (values / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


@triton.jit
def _quantize_row(x, codes, scales, stride, width, E4M3_MAX: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(values), 0)
    scale = tl.where(amax > 0, amax / E4M3_MAX, 1.0)
    scaled = tl.clamp(values / scale, -E4M3_MAX, E4M3_MAX)  # x * (1 / scale) may round past 448
    tl.store(codes + row * width + columns, scaled.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of x [tokens, width] to e4m3 with its own scale; see the module's docstring."""
    tokens, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    if tokens:
        _quantize_row[(tokens,)](
            x,
            codes,
            scales,
            x.stride(0),
            width,
            E4M3_MAX=E4M3_MAX,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),
        )
    return codes, scales
