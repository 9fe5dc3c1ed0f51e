"""Files that hold what a host sees when it misreads a quantised checkpoint.

Each keeps every code of the file it is made from and changes what surrounds them in one way. Here they are
refused until their dialect is insisted on: the weights of the two NVFP4 ones contradict their marks, and codes taken
for weights are too large. In that host they load. A check of clips that accepts these could not fail.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wan_runtime.dialects._swizzle import swizzle

Tensors = dict[str, torch.Tensor]


def drop_scales(source: Path, out: Path) -> None:
    """Comfy scaled FP8 as a host that does not know `scale_weight` reads it: the codes are taken for the weights."""
    tensors, _ = _read(source)
    kept = {
        key: tensor.to(torch.bfloat16) if tensor.dtype == torch.float8_e4m3fn else tensor
        for key, tensor in tensors.items()
        if key != "scaled_fp8" and not key.endswith("scale_weight")
    }
    assert len(kept) < len(tensors), f"{source} holds no scale to drop"
    save_file(kept, out)


def swap_nibbles(source: Path, out: Path) -> None:
    """NVFP4 as a host that expects the even element in the other half of each byte reads it."""
    _rewrite(source, out, torch.uint8, lambda codes: (codes >> 4) | ((codes & 15) << 4))


def mislay_scales(source: Path, out: Path) -> None:
    """NVFP4 with its block scales in the tile order of cuBLAS, where the file's marks say row-major."""

    def tiled(scales: torch.Tensor) -> torch.Tensor:
        moved = swizzle(scales.view(torch.uint8)).view(scales.dtype)
        assert moved.shape == scales.shape, (
            "the tiny model's layers are multiples of 128, and need no padding"
        )
        return moved

    _rewrite(source, out, torch.float8_e4m3fn, tiled)


def _read(source: Path) -> tuple[Tensors, dict[str, str] | None]:
    with safe_open(source, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _rewrite(
    source: Path, out: Path, dtype: torch.dtype, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """`source` with its metadata and every tensor, those of one dtype changed."""
    tensors, metadata = _read(source)
    assert any(t.dtype == dtype for t in tensors.values()), f"{source} holds no {dtype}"
    changed = {key: change(t).contiguous() if t.dtype == dtype else t for key, t in tensors.items()}
    save_file(changed, out, metadata=metadata)
