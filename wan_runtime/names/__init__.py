"""How a host spells the modules of a WAN transformer, and which variant a file's shapes make it.

The original release's names are the canonical ones. Renaming goes by whole path components, once, with the spelling of
the whole file known: diffusers' `norm2` is the original's `norm3`, so applying a rename twice would swap norms.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import BadTensor, CheckpointError, shown

# What hosts put before a transformer's own names, alone or nested: "model.diffusion_model.", "model._orig_mod.".
PREFIX = re.compile(r"((model|diffusion_model|transformer|net|module|_orig_mod)\.)*")
BLOCK_KEY = re.compile(rf"(?P<prefix>{PREFIX.pattern})blocks\.\d+\.(?P<inner>.+)")
HEAD_DIM = 128  # every published WAN transformer
PATCH = (1, 2, 2)


@dataclass(frozen=True)
class Spelling:
    """One spelling. `marks` are starts of paths in a block that only this spelling has; `top` and `block` map leading
    components of a path from this spelling to the original one, a block's rows relative to `blocks.N`."""

    name: str
    marks: tuple[str, ...]
    top: Mapping[str, str]
    block: Mapping[str, str]

    @functools.cached_property
    def inverse(self) -> tuple[dict[str, str], dict[str, str]]:
        """`top` and `block` from the original spelling to this one."""
        return {v: k for k, v in self.top.items()}, {v: k for k, v in self.block.items()}


SPELLINGS: Catalogue[Spelling] = Catalogue("wan_runtime.names", Spelling)


def rename(path: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Apply the longest row that matches whole leading components of a path."""
    parts = path.split(".")
    if parts[0] == "blocks" and len(parts) > 2:
        return ".".join((*parts[:2], *_replace(parts[2:], block)))
    return ".".join(_replace(parts, top))


def _replace(parts: list[str], rows: Mapping[str, str]) -> list[str]:
    for length in range(len(parts), 0, -1):
        target = rows.get(".".join(parts[:length]))
        if target is not None:
            return [*target.split("."), *parts[length:]]
    return parts


def to_original(names: Spelling, path: str) -> str:
    """A path in this spelling -> the original release's."""
    return rename(path, names.top, names.block)


def from_original(names: Spelling, path: str) -> str:
    """A path in the original release's spelling -> this one."""
    return rename(path, *names.inverse)


def without_prefix(key: str) -> str:
    """A key less whatever a host put before the transformer's own names."""
    return PREFIX.sub("", key, count=1)


def naming_of(path: Path, keys: Iterable[str]) -> tuple[Spelling, str]:
    """The one spelling, and the one prefix, that a file's block keys are in.

    Raises CheckpointError when the file is another model or a LoRA, BadTensor when a module is there twice.
    """
    keys = list(keys)
    if any(part.startswith("lora_") for key in keys for part in key.split(".")):
        raise CheckpointError(
            path,
            "this is a LoRA, not a transformer checkpoint. Load the transformer, then give it this file with "
            "pipe.load_lora_weights.",
        )
    found: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        match = BLOCK_KEY.fullmatch(key)
        for name in SPELLINGS if match else ():
            if match and match["inner"].startswith(SPELLINGS[name].marks):
                found.setdefault((name, match["prefix"]), []).append(key)
    if not found:
        raise CheckpointError(
            path,
            "this is not a WAN transformer: no key looks like "
            + " or ".join(f"'blocks.0.{SPELLINGS[name].marks[0]}*'" for name in SPELLINGS)
            + f". Found: {shown(sorted(keys), 6)}. A text encoder or a VAE is not a transformer checkpoint.",
        )
    if len(found) > 1:
        _refuse_twice(path, found)
    [(name, prefix)] = found
    return SPELLINGS[name], prefix


def _refuse_twice(path: Path, found: Mapping[tuple[str, str], list[str]]) -> None:
    """The file names modules in two ways: say which, with a module that is there in both where there is one."""
    seen: dict[str, str] = {}
    twice = tuple(keys[0] for keys in found.values())[:2]
    for (name, prefix), keys in found.items():
        for key in keys:
            one = to_original(SPELLINGS[name], key.removeprefix(prefix))
            if one in seen:
                twice = (seen[one], key)
            seen.setdefault(one, key)
    two = "spellings" if len({name for name, _ in found}) > 1 else "prefixes"
    raise BadTensor(
        path,
        twice[1],
        f"the file's modules are under two {two}, also as {twice[0]!r}; which one is meant? Keep one of them.",
    )


@dataclass(frozen=True)
class Variant:
    """What a checkpoint's shapes say of the model: sizes in features, channels and layers."""

    name: str
    dim: int
    ffn_dim: int
    layers: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    image_dim: int | None = None

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


KNOWN = {  # (dim, layers, in channels, has image embedding) -> the published models of that size
    (1536, 30, 16, False): "T2V-1.3B",
    (5120, 40, 16, False): "T2V-14B (Wan2.1 or one expert of Wan2.2 A14B)",
    (3072, 30, 48, False): "TI2V-5B",
    (5120, 40, 36, True): "I2V-14B",
    (5120, 40, 36, False): "I2V-A14B (one expert of Wan2.2)",
    (256, 6, 16, False): "tiny (trained for tests)",
}


def variant_of(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Variant:
    """The variant that a file's logical shapes (original names, packed dimensions unpacked) describe."""

    def size(key: str, axis: int) -> int:
        shape = shapes.get(key)
        if shape is None or len(shape) <= axis:
            raise CheckpointError(
                path, f"{key} is missing or has shape {shape}; it decides the model's size."
            )
        return shape[axis]

    dim = size("head.head.weight", 1)
    layers = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    in_channels = size("patch_embedding.weight", 1)
    image = shapes.get("img_emb.proj.1.weight")
    if dim % HEAD_DIM:
        raise BadTensor(
            path, "head.head.weight", f"its width {dim} is not a multiple of the head size {HEAD_DIM}."
        )
    known = KNOWN.get((dim, layers, in_channels, image is not None))
    return Variant(
        name=known or f"unlisted WAN variant (dim {dim}, {layers} layers, {in_channels} channels)",
        dim=dim,
        ffn_dim=size("blocks.0.ffn.0.weight", 0),
        layers=layers,
        in_channels=in_channels,
        out_channels=size("head.head.weight", 0) // (PATCH[0] * PATCH[1] * PATCH[2]),
        text_dim=size("text_embedding.0.weight", 1),
        freq_dim=size("time_embedding.0.weight", 1),
        image_dim=image[1] if image else None,
    )
