"""A .pth, .pt or .ckpt file: a pickle, which runs what it says when opened. Read for `convert` alone, as tensors only.

`torch.load(weights_only=True, mmap=True)` builds tensors and containers and refuses every other name in the pickle; the
weights stay in the file until they are used. What is inside must be one dictionary from key to tensor, or a dictionary
with that as its only entry ("model", "state_dict", "generator_ema").
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from wan_runtime.containers import Container, Found
from wan_runtime.containers.safetensors import looks_like_safetensors
from wan_runtime.errors import BadTensor, CheckpointError, shown
from wan_runtime.header import SPELLINGS, Entry, Header

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip archive, or a bare pickle


def _find(path: Path) -> Sequence[Found]:
    """Only a file that is named: text encoders and VAEs lie beside the original release's transformer as .pth."""
    if path.is_dir():
        return ()
    if looks_like_safetensors(path):  # a header of 640 bytes starts like a pickle
        return ()
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({error}).") from error
    return (Found("pickle", path, (path,)),) if start in STARTS else ()


def _read(found: Found) -> Header:
    path = found.path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        KeyError,
        TypeError,
    ) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            path,
            f"torch.load(weights_only=True, mmap=True) refuses it ({reason}). Only tensors are taken out of a pickle, "
            "and only from the archive that torch has written since 1.6. Use the safetensors release of the model.",
        ) from error
    tensors = _tensors(path, content)
    size = path.stat().st_size
    first = min((tensor.untyped_storage().data_ptr() for tensor in tensors.values()), default=0)
    entries = {key: _entry(path, key, tensor, first, size) for key, tensor in tensors.items()}
    if sum(entry.nbytes for entry in entries.values()) > size:
        raise CheckpointError(
            path, f"its tensors claim more than the file's {size} bytes: several share theirs."
        )
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].start))
    return Header(path, ordered, {path: size}, mapped=tensors)


def _tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping) and len(content) == 1:
        [only] = content.values()
        content = only if isinstance(only, Mapping) else content
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(path, f"it holds a {type(content).__name__}, not a dictionary of tensors.")
    odd = [
        str(key)
        for key, value in content.items()
        if type(value) is not torch.Tensor or not isinstance(key, str)
    ]
    if odd:
        raise CheckpointError(
            path,
            f"it holds more than tensors under names: {shown(odd)}. Save the transformer's state dict alone.",
        )
    return dict(content)


def _entry(path: Path, key: str, tensor: torch.Tensor, first: int, size: int) -> Entry:
    """Where a tensor lies, counted from the first one: enough for order and size."""
    if tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.dtype not in SPELLINGS:
        raise BadTensor(
            path, key, f"{tensor.dtype} {list(tensor.shape)} is not stored whole and in row order."
        )
    if tensor.nbytes > size:
        raise BadTensor(path, key, f"it claims {tensor.nbytes} bytes in a file of {size}.")
    start = tensor.data_ptr() - first if tensor.numel() else 0
    return Entry(SPELLINGS[tensor.dtype], tuple(tensor.shape), start, start + tensor.nbytes, path)


CONTAINER = Container("pickle", "a pickle", _find, _read, pickle=True)
