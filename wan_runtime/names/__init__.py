"""How a host spells the modules of a WAN transformer, and which variant a file's shapes make it.

The original release's names are the canonical ones. Renaming goes by whole path components, once, with the spelling of
the whole file known: diffusers' `norm2` is the original's `norm3`, so applying a rename twice would swap norms.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import BadTensor, CheckpointError, shown
from wan_runtime.names._experts import NOISE as NOISE
from wan_runtime.names._experts import noise_in as noise_in
from wan_runtime.names._parts import another_model
from wan_runtime.names._variants import LABELS as LABELS
from wan_runtime.names._variants import PATCH as PATCH
from wan_runtime.names._variants import Animate as Animate
from wan_runtime.names._variants import Variant as Variant
from wan_runtime.names._variants import variant_of as variant_of

# What hosts put before a transformer's own names, alone or nested: "model.diffusion_model.", "model._orig_mod.".
PREFIX = re.compile(r"((model|diffusion_model|transformer|net|module|_orig_mod)\.)*")
BLOCK_KEY = re.compile(rf"(?P<prefix>{PREFIX.pattern})blocks\.\d+\.(?P<inner>.+)")
STACKS = ("blocks", "vace_blocks")  # the lists of transformer blocks: their modules have one table of names


@dataclass(frozen=True)
class Spelling:
    """One spelling. `marks` are starts of paths in a block that only this spelling has; `top` and `block` map leading
    components of a path from this spelling to the original one, a block's rows relative to `blocks.N`. In `top` a
    component N stands for any number, the same one on both sides.

    `halves` says that the spelling keeps an Animate face adapter's keys and values in two modules, where the original
    release has the one `linear1_kv`; see wan_runtime.arranging. `shares` are spellings whose marks a file in this one
    has too.
    """

    name: str
    marks: tuple[str, ...]
    top: Mapping[str, str]
    block: Mapping[str, str]
    halves: bool = False
    shares: tuple[str, ...] = ()

    @functools.cached_property
    def inverse(self) -> tuple[dict[str, str], dict[str, str]]:
        """`top` and `block` from the original spelling to this one."""
        return {v: k for k, v in self.top.items()}, {v: k for k, v in self.block.items()}


SPELLINGS: Catalogue[Spelling] = Catalogue("wan_runtime.names", Spelling)


def rename(path: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    """Apply the longest row that matches whole leading components of a path."""
    parts = path.split(".")
    if block and parts[0] in STACKS and len(parts) > 2:
        return ".".join((*parts[:2], *_replace(parts[2:], block)))
    return ".".join(_replace(parts, top))


def _replace(parts: list[str], rows: Mapping[str, str]) -> list[str]:
    for length in range(len(parts), 0, -1):
        for pattern in itertools.product(*(((p, "N") if p.isdigit() else (p,)) for p in parts[:length])):
            target = rows.get(".".join(pattern))
            if target is not None:
                numbers = [part for part, shape in zip(parts, pattern, strict=False) if shape == "N"]
                return [*(numbers[0] if p == "N" else p for p in target.split(".")), *parts[length:]]
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
            another_model(keys)
            or "this is not a WAN transformer: no key looks like "
            + " or ".join(f"'blocks.0.{SPELLINGS[name].marks[0]}*'" for name in SPELLINGS)
            + f". Found: {shown(sorted(keys), 6)}. A text encoder or a VAE is not a transformer checkpoint.",
        )
    for name, prefix in list(found):
        for shared in SPELLINGS[name].shares:
            found.pop((shared, prefix), None)
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
