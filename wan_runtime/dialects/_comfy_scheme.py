"""What the readers of ComfyUI's formats share: their description, and the rotation (ConvRot) that a record asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wan_runtime.dialects import Layer, Source
from wan_runtime.dialects._comfy_records import Record
from wan_runtime.errors import BadTensor
from wan_runtime.header import Header

ROTATION = 256  # the group size that ComfyUI takes where a record of a rotated layer leaves it out


@dataclass(frozen=True)
class Scheme:
    """One format of ComfyUI's records.

    read    (header, module path, record) -> the layer, and how many weights along `in` share a scale (None: a row's or
            a tensor's all do).
    dtypes  of the weight in the file.
    knows   keys of its record, beside those that any may have.
    pads    its rows and columns are padded to multiples of this.
    """

    read: Callable[[Header, str, Record], tuple[Layer, int | None]]
    dtypes: tuple[str, ...]
    knows: frozenset[str] = frozenset()
    pads: int = 1


def rotation(header: Header, path: str, record: Record, *, always: bool) -> tuple[Source, ...]:
    """The source of a layer's rotation, or none; a format that is `always` rotated may leave `convrot` out."""
    key = f"{path}.weight"
    turned, group = record.get("convrot", always), record.get("convrot_groupsize", ROTATION)
    if type(turned) is not bool or type(group) is not int or (always and not turned):
        raise BadTensor(
            header.path,
            key,
            f"its record says convrot {record.get('convrot')!r} in groups of {group!r}, which {record['format']} "
            "cannot mean.",
        )
    if not turned:
        return ()

    def decode(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
        return torch.tensor([group], dtype=torch.int32, device="cpu")

    return (Source(key, "rotation", decode),)
