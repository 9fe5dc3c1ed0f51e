"""From the tensors of a file to a layer's canonical slots, and to plain tensors as a host wants them: decoded, checked.

All of it happens on the device where the file's tensors are. `refuse` says when a damaged value is told (doubts.py);
what is of a wrong shape or dtype is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from wan_runtime import corrections, gates
from wan_runtime.dialects import Layer
from wan_runtime.doubts import Refuse
from wan_runtime.errors import BadTensor
from wan_runtime.formats import FORMATS, BadSlot, check_cast


def plain(path: Path, key: str, tensor: torch.Tensor, bounded_by: str | None, refuse: Refuse) -> torch.Tensor:
    """An unquantised tensor, checked; fp32 where it was cast to fp8, as a norm or bias of a plain-cast file.

    bounded_by: the dialect that the file was taken for, by whose name a caller can insist on values beyond any WAN
    model's; None where the caller did.
    """
    if tensor.dtype.itemsize == 1:
        check_cast(tensor, _named(refuse, path, lambda error: key))
        tensor = tensor.float()
    if tensor.numel() and tensor.is_floating_point():
        gates.check_plain(path, key, tensor, bounded_by, refuse)
    return tensor


def decoded(
    path: Path, layer: Layer, key: str, tensor: torch.Tensor, refuse: Refuse
) -> dict[str, torch.Tensor]:
    """The slots that one key of a layer gives (a plain fp8 weight gives its scale of 1 too)."""
    slots = {}
    for source in layer.sources:
        if source.key == key:
            if source.check is not None:
                source.check(tensor, _named(refuse, path, lambda error: key))
            try:
                slots[source.slot] = source.decode(tensor, *layer.shape).to(tensor.device)
            except ValueError as error:
                raise BadTensor(path, key, str(error)) from error
    return slots


def complete(
    path: Path, layer: Layer, given: Mapping[str, torch.Tensor], refuse: Refuse
) -> dict[str, torch.Tensor]:
    """The canonical slots, checked, from what all sources of a layer gave."""
    try:
        slots = dict(layer.finish(given))
    except ValueError as error:
        raise BadTensor(path, f"{layer.module}.weight", str(error)) from error
    keys = dict.fromkeys(FORMATS[layer.format].layout(*layer.shape), f"{layer.module}.weight")
    keys |= {source.slot: source.key for source in layer.sources}
    _check_layout(path, layer, slots, keys)
    _check_values(path, layer, slots, keys, refuse)
    return slots


def _check_layout(
    path: Path, layer: Layer, slots: Mapping[str, torch.Tensor], keys: Mapping[str, str]
) -> None:
    """Dtypes and shapes of a complete layer, against its format."""
    weight_format = FORMATS[layer.format]
    refusal = weight_format.refuses(*layer.shape)
    if refusal is not None:
        raise BadTensor(path, keys["payload"], f"it cannot be {layer.format}: {refusal}.")
    for name, (dtype, shapes) in weight_format.layout(*layer.shape).items():
        tensor = slots[name]
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
            raise BadTensor(
                path,
                keys[name],
                f"slot {name} needs {dtype} {list(shapes[0])}; it is {tensor.dtype} {list(tensor.shape)}.",
            )


def _check_values(
    path: Path, layer: Layer, slots: Mapping[str, torch.Tensor], keys: Mapping[str, str], refuse: Refuse
) -> None:
    """Values of a complete layer, against its format and against any WAN model's."""
    static = slots.get("input_scale")
    if static is not None:
        scale = static
        refuse(
            ~(torch.isfinite(scale) & (scale > 0)).all(),
            lambda: BadTensor(
                path, keys["input_scale"], f"an input scale must be positive; it is {scale.item():g}."
            ),
        )

    def key_of(error: Exception) -> str:
        return keys.get(error.slot if isinstance(error, BadSlot) else "", keys["payload"])

    refuse_slot = _named(refuse, path, key_of)
    try:
        weight, around = corrections.split(layer.format, slots)
        FORMATS[layer.format].check(weight, refuse_slot)
        corrections.check(around, *layer.shape, refuse_slot)
        gates.check_size(layer.module, layer.format, weight, layer.shape, refuse_slot)
    except BadSlot as bad:
        raise BadTensor(path, key_of(bad), str(bad)) from bad


def _named(refuse: Refuse, path: Path, key_of: Callable[[Exception], str]) -> Refuse:
    """The same refusal, by an error that names the file and the tensor."""

    def named(fault: torch.Tensor, error: Callable[[], Exception]) -> None:
        def whole() -> BadTensor:
            problem = error()
            bad = BadTensor(path, key_of(problem), str(problem))
            bad.__cause__ = problem
            return bad

        refuse(fault, whole)

    return named
