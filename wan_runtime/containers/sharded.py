"""A set of shards: NAME-00001-of-0000N.safetensors to NAME-0000N-of-0000N.safetensors, or what files an index lists.

The index (NAME.safetensors.index.json; huggingface_hub's save_torch_state_dict, diffusers' save_pretrained) is JSON:
"weight_map" says which file each key is in, "metadata" holds "total_size" and what the files' own metadata lack.
Without an index the shards' names say how many there are. total_size is the bytes of all tensors; LightX2V's converter
writes the bytes of all files instead, and for a checkpoint in one file an index of nothing, which is passed over.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_runtime.containers import Container, Found
from wan_runtime.containers._joined import joined
from wan_runtime.containers.safetensors import MAX_HEADER_BYTES, without_repeats
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors, shown
from wan_runtime.header import Header

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Index:
    """An index file's content: key -> file name, and the metadata beside it."""

    path: Path
    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]


def _find(path: Path) -> Sequence[Found]:
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name.endswith(INDEX):
        return (_indexed(_read_index(path)),)
    indices = [_read_index(file) for file in sorted(folder.glob(f"*{INDEX}"))]
    finds = [_indexed(index) for index in indices if index.weight_map]
    listed = {file for found in finds for file in found.files}
    finds += [found for found in _named(folder) if listed.isdisjoint(found.files)]
    return finds if path.is_dir() else [found for found in finds if path in found.files]


def _indexed(index: Index) -> Found:
    names = sorted({name for listed in set(index.weight_map.values()) for name in _siblings(listed)})
    return Found("sharded", index.path, (index.path, *(index.path.parent / name for name in names)))


def _named(folder: Path) -> list[Found]:
    """Sets without an index, each called by its first shard that is there."""
    finds: dict[tuple[Path, ...], Found] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if SHARD.fullmatch(file.name):
            files = tuple(folder / name for name in _siblings(file.name))
            finds.setdefault(files, Found("sharded", file, files))
    return list(finds.values())


def _siblings(name: str) -> list[str]:
    """The files of the set that a file's name says it is one of; itself where it says nothing."""
    match = SHARD.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MAX_SHARDS:
        return [name]
    count = int(match["count"])
    return [f"{match['name']}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _read_index(path: Path) -> Index:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(
            path, f"this index has {path.stat().st_size} bytes; it is no index of a checkpoint."
        )
    try:
        fields = json.loads(path.read_bytes().decode(), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"this index is not valid JSON ({error}). Download it again.") from error
    match fields:
        case {"weight_map": dict(weight_map), **others}:
            metadata = others.get("metadata", {})
        case _:
            raise CheckpointError(path, "this index has no weight_map, which says which file each key is in.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadTensor(
                path,
                key,
                f"the index puts it into {str(name)[:80]!r}, not a .safetensors file beside the index.",
            )
    return Index(path, weight_map, metadata if isinstance(metadata, dict) else {})


def _read(found: Found) -> Header:
    if not found.path.name.endswith(INDEX):
        return joined(found.path, found.files)
    index = _read_index(found.path)
    if not index.weight_map:
        raise CheckpointError(found.path, "this index lists no tensor; name the .safetensors file itself.")
    _check_names(index, found)
    header = joined(found.path, found.files[1:])
    _check_map(index, header)
    _check_size(index, header)
    said = {name: value for name, value in index.metadata.items() if isinstance(value, str)}
    return dataclasses.replace(header, metadata={**said, **header.metadata})


def _check_names(index: Index, found: Found) -> None:
    """Files that are named as 1 to n of n are all listed: a file of a set holds at least one tensor."""
    listed = set(index.weight_map.values())
    missing = [file.name for file in found.files[1:] if file.name not in listed]
    if missing:
        raise CheckpointError(
            index.path,
            f"it lists no tensor in {shown(missing)}, of which it lists other shards: the index is cut short. Download "
            "it again.",
        )


def _check_map(index: Index, header: Header) -> None:
    """Each key is in the file that the index says, and in no other."""
    lost = [f"{key} (in {name})" for key, name in index.weight_map.items() if key not in header.entries]
    if lost:
        raise UnaccountedTensors(
            index.path, unfilled=lost, hint="The index lists them and their files have none of that name."
        )
    extra = [f"{key} (in {e.file.name})" for key, e in header.entries.items() if key not in index.weight_map]
    if extra:
        raise UnaccountedTensors(
            index.path,
            unconsumed=extra,
            hint="The index does not list them; files and index are not of one set.",
        )
    for key, entry in header.entries.items():
        if entry.file.name != index.weight_map[key]:
            raise BadTensor(
                index.path,
                key,
                f"the index puts it into {index.weight_map[key]} and it is in {entry.file.name}.",
            )


def _check_size(index: Index, header: Header) -> None:
    said = index.metadata.get("total_size")
    if said is None:
        return
    tensors = sum(entry.nbytes for entry in header.entries.values())
    if said not in (tensors, header.nbytes):
        raise CheckpointError(
            index.path,
            f"it says total_size {shown([str(said)])}; the tensors of its {len(header.files)} files have {tensors} "
            f"bytes and the files {header.nbytes}. Index and files are not of one set.",
        )


CONTAINER = Container("sharded", "a set of shards", _find, _read)
