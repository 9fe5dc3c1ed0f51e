"""What a folder must hold to be a part of a pipeline, and whether a base has every part that is taken from it.

Looked for by `load_pipeline` and `plan_pipeline` alike, before a weight is loaded: diffusers and transformers would say
it only after the transformer had been.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.bases import Base, held, release_of
from wan_runtime.checkpoint import Checkpoint
from wan_runtime.containers import locate, read_header
from wan_runtime.containers.safetensors import read_file
from wan_runtime.errors import CheckpointError, InvalidOption, shown
from wan_runtime.names._umt5 import TOKENIZER


@dataclass(frozen=True)
class Part:
    """A part's folder: one file of each group must be in it, under the names that its class looks for.

    weights  the group whose file holds tensors, or is the index of shards that do; () where the part has none.
    instead  what may be given in the part's place.
    """

    config: tuple[str, ...]
    weights: tuple[str, ...] = ()
    instead: str = ""


def _named(stem: str) -> tuple[str, ...]:
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


PARTS = {
    "text_encoder": Part(("config.json",), _named("model"), "--text-encoder"),
    "tokenizer": Part(
        ("tokenizer.json", "spiece.model"),
        instead="a --text-encoder file that brings its own, as ComfyUI's does",
    ),
    "vae": Part(("config.json",), _named("diffusion_pytorch_model"), "--vae"),
    "scheduler": Part(("scheduler_config.json",)),
    "image_encoder": Part(("config.json",), _named("model")),
    "image_processor": Part(("preprocessor_config.json", "processor_config.json")),
}


def check_base(
    base: Base, transformer: Checkpoint, text_encoder: Path | str | None, vae: Path | str | None
) -> None:
    """Refuse a folder that lacks a part which the pipeline takes from it; of a hub id nothing is known here.

    text_encoder, vae: what is given in the place of the base's. Reads small files, and of weights the headers.

    Raises InvalidOption with everything that is missing, what the folder holds instead, and the remedy.
    """
    folder = Path(base.name)
    if base.index is None or not folder.is_dir():
        return
    found = {name: problem(folder / name, PARTS[name]) for name in _needed(transformer, text_encoder, vae)}
    lacks = {name: why for name, why in found.items() if why is not None}
    if not lacks:
        return
    listed = "; ".join(f"{name} ({why})" for name, why in lacks.items())
    release = release_of(transformer.variant)
    whole = f"Give a whole release ({release})" if release else "Give a whole release of this model"
    instead = "".join(
        f" In place of {name}, {PARTS[name].instead} serves too." for name in lacks if PARTS[name].instead
    )
    raise InvalidOption(
        f"--base {folder} lacks {len(lacks)} of the parts that are taken from it: {listed}. It holds {held(folder)}. "
        f"{whole}, downloaded again where this was one.{instead}"
    )


def problem(folder: Path, part: Part) -> str | None:
    """Why a folder is not this part, in words; None where all its files are there and whole."""
    if not folder.is_dir():
        return "there is no such folder"
    for group in filter(None, (part.config, part.weights)):
        there = next((folder / name for name in group if (folder / name).is_file()), None)
        if there is None:
            return f"it has no {' or '.join(group)}; it holds {held(folder)}"
        why = _damage(there, holds_weights=group is part.weights)
        if why is not None:
            return why
    return None


def _damage(file: Path, *, holds_weights: bool) -> str | None:
    try:
        if holds_weights:
            return _torn(file)
        if file.suffix == ".json":
            json.loads(file.read_text())
    except CheckpointError as error:
        return str(error).rstrip(".")
    except (OSError, ValueError) as error:
        return f"its {file.name} cannot be read: {error}"
    return None


def _torn(file: Path) -> str | None:
    """What is missing of a file of tensors, or of the shards that an index lists; raises CheckpointError for one cut
    short. Which tensors there are is left to the part's own class: an index may list one that is tied to another."""
    files = locate(file)[0].files[1:] if file.suffix == ".json" else (file,)
    absent = [shard.name for shard in files if not shard.is_file()]
    if absent:
        return f"its {file.name} lists {shown(absent)}, not there"
    for shard in files:
        read_file(shard)
    return None


def _needed(
    transformer: Checkpoint, text_encoder: Path | str | None, vae: Path | str | None
) -> Iterator[str]:
    """The parts that the base is asked for."""
    if text_encoder is None:
        yield "text_encoder"
    if text_encoder is None or not _brings_tokenizer(Path(text_encoder)):
        yield "tokenizer"
    if vae is None:
        yield "vae"
    yield "scheduler"
    if transformer.variant.image_dim is not None:
        yield from ("image_encoder", "image_processor")


def _brings_tokenizer(text_encoder: Path) -> bool:
    """Whether a text encoder is a file with the tokenizer in it; the base's own is then not missed."""
    if text_encoder.is_dir():
        return False
    return any(key.rpartition(".")[2] == TOKENIZER for key in read_header(text_encoder).entries)
