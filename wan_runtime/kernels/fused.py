"""The kernels of a fused block forward as one value: Triton's, the same as operators for torch.compile, or their
plain-torch twins (the same arithmetic on any device, for tests and as the specification)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wan_runtime.kernels import ops
from wan_runtime.kernels._rows import Rows
from wan_runtime.kernels.attention_output import attention_output, attention_output_torch
from wan_runtime.kernels.gelu_quantize import gelu_quantize, gelu_quantize_torch
from wan_runtime.kernels.norm_modulate import norm_modulate, norm_modulate_torch
from wan_runtime.kernels.norm_rope import norm_rope, norm_rope_torch
from wan_runtime.kernels.quantize_heads import quantize_heads, quantize_heads_torch
from wan_runtime.kernels.residual_norm import residual_norm, residual_norm_torch


@dataclass(frozen=True)
class Kernels:
    """One function a fused operation; each is described in the module of its name."""

    norm_modulate: Callable[..., Rows]
    residual_norm: Callable[..., tuple[torch.Tensor, Any]]
    norm_rope: Callable[..., torch.Tensor]
    gelu_quantize: Callable[..., Rows]
    attention_output: Callable[..., Rows]
    quantize_heads: Callable[..., tuple[torch.Tensor, torch.Tensor]]


TRITON = Kernels(norm_modulate, residual_norm, norm_rope, gelu_quantize, attention_output, quantize_heads)
OPERATORS = Kernels(
    ops.norm_modulate,
    ops.residual_norm,
    ops.norm_rope,
    ops.gelu_quantize,
    ops.attention_output,
    ops.quantize_heads,
)  # TRITON under torch.compile
TWINS = Kernels(
    norm_modulate_torch,
    residual_norm_torch,
    norm_rope_torch,
    gelu_quantize_torch,
    attention_output_torch,
    quantize_heads_torch,
)


def kernels_named(name: str) -> Kernels:
    """TRITON, OPERATORS or TWINS; TRITON's operators while torch.compile traces."""
    if name == "TRITON" and torch.compiler.is_compiling():
        return OPERATORS
    return {"TRITON": TRITON, "OPERATORS": OPERATORS, "TWINS": TWINS}[name]
