"""`python -m tests.compiled ARCH [SIZE ...]`: compiles every fused kernel for a GPU that need not be there.

Prints one JSON object a kernel: {"kernel", "case", "arch", "shared"}, shared memory in bytes. It is a process of its
own, as Triton decides when it is imported whether it interprets or compiles.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from wan_runtime.kernels._codes import Codes
from wan_runtime.kernels._launch import Launch
from wan_runtime.kernels.attention_output import attention_output
from wan_runtime.kernels.expand_nvfp4 import expand_nvfp4
from wan_runtime.kernels.gelu_quantize import gelu_quantize
from wan_runtime.kernels.norm_modulate import Modulation, norm_modulate
from wan_runtime.kernels.norm_rope import norm_rope
from wan_runtime.kernels.quantize_heads import quantize_heads
from wan_runtime.kernels.quantize_mxfp8 import quantize_mxfp8
from wan_runtime.kernels.quantize_nvfp4 import quantize_nvfp4
from wan_runtime.kernels.residual_norm import residual_norm

TOKENS, EPS = 64, 1e-6
SIZES = {"1.3B": (1536, 8960), "5B": (3072, 14336), "14B": (5120, 13824)}


class AbsentGpu:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def cases(width: int, ffn: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The launches of a block of this width, with a modulation for all tokens and with one a token."""
    x, bias, table = zeros(TOKENS, width, dtype=dtype), zeros(width), zeros(2, 6, width)
    index = zeros(TOKENS, dtype=torch.int32)
    one, two = (
        Modulation(table[:1, 1], table[:1, 0], EPS),
        Modulation(table[:, 1], table[:, 0], EPS, index=index),
    )
    codes = zeros(TOKENS, width, dtype=torch.float8_e4m3fn)
    four = Launch(tile=4)  # what a sweep may choose for narrow rows
    angles = zeros(TOKENS, 128)
    packed = zeros(ffn, width // 2, dtype=torch.uint8)
    return {
        **{
            f"{name} to {kind.name}": functools.partial(launch, kind)
            for kind in (Codes.MXFP8, Codes.NVFP4)
            for name, launch in {
                "norm_modulate": lambda kind: norm_modulate(x, one, kind),
                "residual_norm": lambda kind: residual_norm(x, bias, table[:, 2], x, index, two, kind),
                "gelu_quantize": lambda kind: gelu_quantize(zeros(TOKENS, ffn, dtype=dtype), zeros(ffn), kind),
                "attention_output": lambda kind: attention_output(x, bias, x, kind),
            }.items()
        },
        "norm_modulate": lambda: norm_modulate(x, one, True),
        "norm_modulate of an offset": lambda: norm_modulate(x, one, True, offset=bias),
        "norm_modulate, an entry a token": lambda: norm_modulate(x, two, True),
        "residual_norm": lambda: residual_norm(x, bias, table[:1, 2], x, None, one, True),
        "residual_norm, an entry a token": lambda: residual_norm(x, bias, table[:, 2], x, index, two, True),
        "residual_norm without a residual": lambda: residual_norm(x, bias, None, None, None, one, True),
        "residual_norm without either": lambda: residual_norm(x, bias, None, None, None, None, False, into=x),
        "residual_norm without a norm": lambda: residual_norm(x, bias, table[:1, 2], x, None, None, False),
        "norm_rope": lambda: norm_rope(x, bias, bias, EPS, angles),
        "norm_rope to codes": lambda: norm_rope(x, bias, bias, EPS, angles, codes),
        "norm_rope without rotation": lambda: norm_rope(x, bias, bias, EPS, None),
        "gelu_quantize": lambda: gelu_quantize(zeros(TOKENS, ffn, dtype=dtype), zeros(ffn), True),
        "attention_output": lambda: attention_output(x, bias, None, True),
        "attention_output of two": lambda: attention_output(x, bias, x, True),
        "quantize_rows": lambda: attention_output(x, None, None, True),
        "norm_modulate, four rows": lambda: norm_modulate(x, one, True, four),
        "residual_norm, four rows": lambda: residual_norm(
            x, bias, table[:, 2], x, index, two, True, launch=four
        ),
        "norm_rope, four rows": lambda: norm_rope(x, bias, bias, EPS, angles, codes, four),
        "attention_output, four rows": lambda: attention_output(x, bias, x, True, four),
        "quantize_heads": lambda: quantize_heads(x.view(1, TOKENS, -1, 128)),
        "quantize_nvfp4": lambda: quantize_nvfp4(x, None),
        "quantize_nvfp4, static": lambda: quantize_nvfp4(x, zeros(1, 1)),
        "quantize_mxfp8": lambda: quantize_mxfp8(x),
        "expand_nvfp4": lambda: expand_nvfp4(packed, zeros(ffn, width // 16, dtype=torch.uint8), zeros(1, 1)),
    }  # fmt: skip


def main(arch: int, sizes: list[str]) -> None:
    driver.set_active(AbsentGpu(arch))
    compiled: list[Any] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = only_compile
    for size in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            for case, launch in cases(*SIZES[size], dtype).items():
                launch()
                for kernel in compiled:
                    row = {"kernel": kernel.metadata.name, "case": f"{size} {case}, {dtype}", "arch": arch}
                    print(json.dumps({**row, "shared": kernel.metadata.shared}), flush=True)
                compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or list(SIZES))
