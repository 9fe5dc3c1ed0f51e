"""The base of a checkpoint: the diffusers release that has what a transformer's file lacks. Which one a model needs,
whether what was given is one, and what it says of the pipeline; all from headers and one JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.errors import InvalidOption, shown
from wan_runtime.names import Variant

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT, IMAGE = "WanPipeline", "WanImageToVideoPipeline"  # diffusers' classes: what a clip starts from
A14B_BOUNDARY = {
    TEXT: 0.875,
    IMAGE: 0.9,
}  # where Wan2.2 A14B hands over to its low-noise expert, as published
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
RELEASES = {  # the start of a variant's name -> the releases that its base can be, each with what it is for
    "T2V-1.3B": {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ""},
    "T2V-14B": {
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": "Wan2.1",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "Wan2.2's two experts",
    },
    "TI2V-5B": {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": ""},
    "I2V-14B": {
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "480P",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "720P",
    },
    "I2V-A14B": {"Wan-AI/Wan2.2-I2V-A14B-Diffusers": ""},
}


@dataclass(frozen=True)
class Base:
    """A diffusers directory or hub id, and its model_index.json; None where a hub id was not looked up."""

    name: str
    index: Mapping[str, Any] | None

    def boundary(self, kind: str, two_experts: bool) -> float | None:
        """Where the high-noise expert hands over, as a share of the noise; None for a model of one.

        Raises InvalidOption for a base of another number of experts than was given, or of the other `kind`.
        """
        boundary = (self.index or {}).get("boundary_ratio")
        if boundary is None:
            return A14B_BOUNDARY[kind] if two_experts else None
        assert self.index is not None
        if not two_experts:
            raise InvalidOption(
                f"--base {self.name} is of a model with two experts (boundary_ratio {boundary}), and one checkpoint "
                "was given. Give the high-noise file as --checkpoint and the low-noise file as --checkpoint-low."
            )
        if self.index["_class_name"] != kind:
            raise InvalidOption(
                f"--base {self.name} is of a {self.index['_class_name']}, and the checkpoints are of a {kind}: the two "
                "hand over to the low-noise expert at different steps. Give the base of this model."
            )
        return float(boundary)


def tiny_base() -> Path:
    """The bundled tiny pipeline, a diffusers directory."""
    from wan_runtime.tiny import path

    return Path(path())


def tiny_checkpoint() -> Path:
    """The bundled tiny model's transformer, bf16 under diffusers names."""
    return tiny_base() / "transformer" / WEIGHTS


def kind_of(checkpoint: Checkpoint) -> str:
    """The pipeline that a transformer is of. Raises InvalidOption where no pipeline of ours draws with it."""
    variant = checkpoint.variant
    if variant.kind != "base":
        raise InvalidOption(
            f"{checkpoint.path} is of {variant.name}, and no clips are made with it here: only with text-to-video and "
            "image-to-video models."
        )
    if variant.image_tokens is not None:
        raise InvalidOption(
            f"{checkpoint.path} is of a first-and-last-frame model (FLF2V), which needs two images; only models that "
            "start from one are served."
        )
    return IMAGE if variant.in_channels > variant.out_channels else TEXT


def base_of(checkpoint: Checkpoint, given: Path | str | None, *, look_up: bool = True) -> Base:
    """The base that was given, or the bundled one for a checkpoint of the tiny model's sizes.

    look_up: whether the hub may be asked for one that is no directory.

    Raises InvalidOption where it is missing or none.
    """
    if given is not None:
        return _opened(str(given), look_up)
    if checkpoint.variant == open_checkpoint(tiny_checkpoint()).variant:
        return _opened(str(tiny_base()), look_up)
    release = release_of(checkpoint.variant) or "--base; no release of these sizes is known"
    raise InvalidOption(
        f"{checkpoint.path} holds the transformer alone, of {checkpoint.variant.name}. Name the diffusers directory or "
        f"hub id that has its text encoder, VAE, tokenizer and scheduler with {release}."
    )


def release_of(variant: Variant) -> str | None:
    """The options that name the releases which can be a variant's base, in words; None where none is known."""
    for start, releases in RELEASES.items():
        if variant.name.partition(" ")[0] == start:
            named = (f"--base {name}" + (f" ({use})" if use else "") for name, use in releases.items())
            return " or ".join(named)
    return None


def _opened(base: str, look_up: bool) -> Base:
    is_hub_id = HUB_ID.fullmatch(base) and not Path(base).exists()
    if is_hub_id and not look_up:
        return Base(base, None)
    if not is_hub_id and not Path(base).is_dir():
        raise _not_a_base(base, "there is no such directory, and a hub id is OWNER/NAME.")
    index = _looked_up(base) if is_hub_id else _index_in(Path(base))
    if index.get("_class_name") not in (TEXT, IMAGE):
        raise InvalidOption(
            f"--base {base} is a {index.get('_class_name')}; this makes clips with a {TEXT} or a {IMAGE}."
        )
    return Base(base, index)


def _index_in(base: Path) -> dict[str, Any]:
    """A folder's model_index.json; without diffusers, which takes longer to import than all that is refused here."""
    file = base / "model_index.json"
    if not file.is_file():
        raise _not_a_base(str(base), f"there is no model_index.json in it; it holds {held(base)}.")
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _not_a_base(str(base), f"its model_index.json cannot be read: {error}.") from error


def held(folder: Path) -> str:
    """What lies in a folder, for a message."""
    return shown(sorted(path.name for path in folder.iterdir())) or "nothing"


def _looked_up(hub_id: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(hub_id))
    except (OSError, ValueError) as error:
        raise _not_a_base(hub_id, str(error)) from error


def _not_a_base(base: str, why: str) -> InvalidOption:
    return InvalidOption(
        f"--base {base} is not a diffusers directory (with a model_index.json) nor a hub id that can be reached: {why}"
    )
