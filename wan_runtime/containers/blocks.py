"""A folder with one file a block: block_0.safetensors ... block_(n-1).safetensors and non_block.safetensors.

LightX2V's converter writes it (`--save_by_block`; tools/convert/converter.py), with or without an index beside: where
there is one, the set is the index's. Numbers may not have gaps, and a file holds the keys of its own block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wan_runtime.containers import Container, Found
from wan_runtime.containers._joined import joined
from wan_runtime.errors import BadTensor, CheckpointError, shown
from wan_runtime.header import Header

BLOCK_FILE = re.compile(r"block_(0|[1-9]\d{0,3})\.safetensors")
REST = "non_block.safetensors"
# Not vace_blocks. and fuser_blocks., which lie in the file of the block that they feed.
BLOCK_KEY = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def _find(path: Path) -> Sequence[Found]:
    folder = path if path.is_dir() else path.parent
    numbers = sorted(
        int(match[1]) for file in folder.iterdir() if (match := BLOCK_FILE.fullmatch(file.name)) is not None
    )
    if not numbers or not (path.is_dir() or path.name == REST or BLOCK_FILE.fullmatch(path.name)):
        return ()
    names = [f"block_{number}.safetensors" for number in numbers]
    return (Found("blocks", folder, tuple(folder / name for name in [*names, REST])),)


def _read(found: Found) -> Header:
    *blocks, _ = found.files
    gaps = [
        f"block_{n}.safetensors"
        for n in range(len(blocks))
        if found.path / f"block_{n}.safetensors" not in blocks
    ]
    if gaps:
        raise CheckpointError(
            found.path,
            f"it has {len(blocks)} files block_N.safetensors up to {blocks[-1].name} and these are missing: "
            f"{shown(gaps)}. Download the folder again.",
        )
    header = joined(found.path, found.files)
    for key, entry in header.entries.items():
        match = BLOCK_KEY.search(key)
        if match is not None and entry.file.name != f"block_{int(match[1])}.safetensors":
            raise BadTensor(
                found.path, key, f"it is in {entry.file.name}, which is another block's; were files renamed?"
            )
    return header


CONTAINER = Container("blocks", "a file for each block", _find, _read)
