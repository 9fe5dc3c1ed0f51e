"""The readings of the tiny model's weights that its clips are scored under, right ones and misreadings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import wan_runtime

from . import misread, path

SOURCE = path() / "transformer" / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Variant:
    """One reading: its column's label, what `convert` writes (None: the bf16 weights), and what is then misread.

    dialect: insisted on, where a misreading is otherwise refused: its weights contradict its marks, or are too large.
    """

    label: str
    kind: str | None
    misreading: Callable[[Path, Path], None] | None = None
    dialect: str | None = None


VARIANTS: dict[str, Variant] = {
    "bf16": Variant("bf16", None),
    "comfy-fp8-scaled": Variant("FP8", "comfy-fp8-scaled"),
    "modelopt-nvfp4": Variant("NVFP4", "modelopt-nvfp4"),
    "fp8-scales-dropped": Variant("FP8, scales dropped", "comfy-fp8-scaled", misread.drop_scales, "plain"),
    "nvfp4-nibbles-swapped": Variant(
        "NVFP4, nibbles swapped", "modelopt-nvfp4", misread.swap_nibbles, "modelopt"
    ),
    "nvfp4-scales-mislaid": Variant(
        "NVFP4, scales mislaid", "modelopt-nvfp4", misread.mislay_scales, "modelopt"
    ),
}


def checkpoint(name: str, folder: Path, names: str = "original") -> Path:
    """The file of a variant, made in `folder` if it is not there or older than the tiny model's weights."""
    variant = VARIANTS[name]
    if variant.kind is None:
        return SOURCE
    out = folder / f"{name}-{names}.safetensors"
    if out.exists() and out.stat().st_mtime > SOURCE.stat().st_mtime:
        return out
    folder.mkdir(parents=True, exist_ok=True)
    if variant.misreading is None:
        wan_runtime.convert(SOURCE, out, to=variant.kind, names=names)
    else:
        with wan_runtime.written_aside(out) as aside:
            variant.misreading(checkpoint(variant.kind, folder, names), aside)
    return out


def differences(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """The names of what two models do not share bit for bit: none when they hold the same weights."""
    a, b = one.state_dict(), other.state_dict()
    absent = [name for name in {*a, *b} if name not in a or name not in b]
    return sorted(absent + [name for name in a if name in b and not torch.equal(a[name], b[name])])
