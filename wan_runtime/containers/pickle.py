"""A .pth, .pt or .ckpt file: a pickle, which runs what it says when opened. Read for `convert` alone, as tensors only.

`torch.load(weights_only=True, mmap=True)` builds tensors and containers and refuses every other name in the pickle; the
weights stay in the file until they are used. What is inside must be one dictionary from key to tensor, or a dictionary
with that as its only entry ("model", "state_dict", "generator_ema").
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from wan_runtime.containers import Container, Found
from wan_runtime.containers.safetensors import looks_like_safetensors
from wan_runtime.errors import BadTensor, CheckpointError, shown
from wan_runtime.header import SPELLINGS, Entry, Header

STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip archive, or a bare pickle


def _find(path: Path) -> Sequence[Found]:
    """Only a file that is named: text encoders and VAEs lie beside the original release's transformer as .pth."""
    if path.is_dir() or looks_like_safetensors(path):  # a header of 640 bytes starts like a pickle
        return ()
    with open(path, "rb") as file:
        start = file.read(2)
    return (Found("pickle", path, (path,)),) if start in STARTS else ()


def _read(found: Found) -> Header:
    path = found.path
    size = path.stat().st_size
    _check_stored(path)
    tensors = {key: _whole(path, key, tensor, size) for key, tensor in _tensors(path, _loaded(path)).items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > size:
        raise CheckpointError(
            path, f"its tensors claim more than the file's {size} bytes: several share theirs."
        )
    first = min((tensor.data_ptr() for tensor in tensors.values() if tensor.numel()), default=0)
    ordered = sorted(tensors.items(), key=lambda item: item[1].data_ptr())
    entries = {key: _entry(path, tensor, first) for key, tensor in ordered}
    return Header(path, entries, {path: size}, mapped=tensors)


def _check_stored(path: Path) -> None:
    """torch stores its records as they are; a compressed one could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            path,
            "it is a bare pickle, or an archive that is cut short. Only the archive that torch writes since 1.6 can be "
            "read without running code. Download it again, or use the safetensors release of the model.",
        ) from error
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            path, f"its records are compressed ({shown(packed, 3)}); torch does not write that."
        )


def _loaded(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError, TypeError) as error:
        if "torchao." in str(error):
            raise CheckpointError(
                path,
                "its weights are torchao's tensor subclasses, pickled, which mean something only to the version of "
                "torchao that wrote them. Where it was made, save it with flatten_tensor_state_dict of "
                "torchao.prototype.safetensors and safetensors' save_file; that is read.",
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            path,
            f"torch.load(weights_only=True) refuses it ({reason}). Only plain tensors are taken out of a pickle: use "
            "the safetensors release of the model, or save its state dict with safetensors where it was made.",
        ) from error


def _tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping) and len(content) == 1:
        [only] = content.values()
        content = only if isinstance(only, Mapping) else content
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(path, f"it holds a {type(content).__name__}, not a dictionary of tensors.")
    odd = [
        f"{key} ({type(v).__name__})"
        for key, v in content.items()
        if type(v) not in (torch.Tensor, torch.nn.Parameter) or type(key) is not str
    ]
    if odd:
        raise CheckpointError(
            path,
            f"it holds more than tensors by name: {shown(odd)}. Save the transformer's state dict alone.",
        )
    return dict(content)


def _whole(path: Path, key: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor, if its elements lie in the file one after the other."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in SPELLINGS
    if not plain or tensor.is_neg() or not tensor.is_contiguous():
        raise BadTensor(
            path, key, f"{tensor.dtype} {list(tensor.shape)} is not stored whole and in row order."
        )
    if tensor.nbytes > size:
        raise BadTensor(path, key, f"it claims {tensor.nbytes} bytes in a file of {size}.")
    return tensor.detach()


def _entry(path: Path, tensor: torch.Tensor, first: int) -> Entry:
    """Where a tensor lies, counted from the first one: enough for order and size."""
    start = tensor.data_ptr() - first if tensor.numel() else 0
    return Entry(SPELLINGS[tensor.dtype], tuple(tensor.shape), start, start + tensor.nbytes, path)


CONTAINER = Container("pickle", "a pickle", _find, _read, pickle=True)
