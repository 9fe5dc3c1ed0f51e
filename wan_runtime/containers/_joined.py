"""One header from the files of a set: every key in one of them, and metadata that does not contradict itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wan_runtime.containers._folders import config_in
from wan_runtime.containers.safetensors import read_file
from wan_runtime.errors import BadTensor, CheckpointError, shown
from wan_runtime.header import Entry, Header


def joined(path: Path, files: Iterable[Path]) -> Header:
    """The header of all files together, in their order; they lie in one folder.

    Raises BadTensor for a key that two of them hold, CheckpointError when one is missing or their metadata disagree.
    """
    files = list(files)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            path,
            f"{len(missing)} of its {len(files)} files are missing: {shown(missing)}. Download them into the same "
            "folder.",
        )
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    sizes: dict[Path, int] = {}
    for file in files:
        header = read_file(file)
        for key, entry in header.entries.items():
            if key in entries:
                raise BadTensor(path, key, f"it is in {entries[key].file.name} and in {file.name} too.")
            entries[key] = entry
        _add(path, metadata, header.metadata, file)
        sizes |= header.files
    return Header(path, entries, sizes, metadata, config_in(files[0].parent))


def _add(path: Path, metadata: dict[str, str], more: Mapping[str, str], file: Path) -> None:
    for name, text in more.items():
        if metadata.setdefault(name, text) == text:
            continue
        try:
            metadata[name] = json.dumps(_merged(json.loads(metadata[name]), json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                path,
                f"its files disagree on the metadata {name!r}: {text[:80]!r} in {file.name} and "
                f"{metadata[name][:80]!r} before it. They are not of one checkpoint.",
            ) from error


def _merged(one: Any, two: Any) -> Any:
    """Two JSON values that each describe their own file's tensors, as one; ValueError where they disagree."""
    if one == two:
        return one
    if isinstance(one, dict) and isinstance(two, dict):
        both = {name: _merged(one[name], two[name]) for name in one.keys() & two.keys()}
        return {**one, **two, **both}
    if isinstance(one, list) and isinstance(two, list):
        return [*one, *(item for item in two if item not in one)]
    raise ValueError("the values differ")
