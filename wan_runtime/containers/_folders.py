"""Which folder of a diffusers pipeline holds the transformer, and what a folder without a checkpoint is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_runtime.errors import CheckpointError, shown

EXPERTS = {"transformer": "high-noise", "transformer_2": "low-noise"}  # a two-expert pipeline's, in diffusers
CONFIG_BYTES = 1_000_000


def transformer_in(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds the weights, and a note where it is one of two experts'."""
    if (folder / "model_index.json").is_file():
        inner = folder / "transformer"
        if not inner.is_dir():
            raise CheckpointError(
                folder, "it has a model_index.json, as a diffusers pipeline, and no folder transformer/."
            )
        return inner, _expert(inner, asked=False)
    return folder, _expert(folder, asked=True)


def _expert(folder: Path, asked: bool) -> tuple[str, ...]:
    """What to say of a folder that is one of two experts'. `asked` is whether the caller named it."""
    whole = folder.absolute()
    others = [name for name in EXPERTS if name != whole.name]
    pipeline = whole.parent / "model_index.json"
    if whole.name not in EXPERTS or not pipeline.is_file() or not (whole.parent / others[0]).is_dir():
        return ()
    other = f"the {EXPERTS[others[0]]} one is {folder.parent / others[0]}"
    return (
        f"{whole.name}/ {'is' if asked else 'was chosen:'} the {EXPERTS[whole.name]} expert of two; {other}",
    )


def empty_folder(folder: Path) -> str:
    """Why nothing in a folder can be loaded, and what in it can be named instead."""
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt", ".ckpt") and p.is_file())
    if inner:
        return f"the folder holds no checkpoint itself; its folders {shown(inner)} do. Name one of them."
    if pickles:
        return (
            f"the folder holds no .safetensors file. It has {shown(pickles)}: a pickle is read by `wan-runtime "
            "convert` alone, and must be named."
        )
    names = sorted(p.name for p in folder.iterdir())
    return f"the folder holds no checkpoint. It has {shown(names, 6) if names else 'nothing at all'}."


def config_in(folder: Path) -> Mapping[str, Any]:
    """The config.json of a diffusers model folder, or nothing where the folder is none."""
    file = folder / "config.json"
    if not file.is_file() or file.stat().st_size > CONFIG_BYTES:
        return {}
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            file, f"this config.json beside the checkpoint is not valid JSON ({error})."
        ) from error
    return config if isinstance(config, dict) and "_class_name" in config else {}
