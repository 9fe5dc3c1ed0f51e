"""What a file gives each module of a model, read and checked beside the model before the model changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from wan_runtime.backends import backend_named
from wan_runtime.checkpoint import Loaded
from wan_runtime.corrections import effective_weight
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.names import Spelling, from_original
from wan_runtime.plan import Decision, bare

ONE_SCALE = (
    "it multiplies FP8 weights that have one scale a tensor, and the file's have one an output channel. weights='fp8' "
    "quantises them anew, which is a second rounding; backend='torch' takes them as they are."
)


@dataclass
class Stage:
    """What was read for each module, by the host's path: slots of quantised weights, and plain tensors by leaf.

    `rescaled` are layers whose FP8 weights had one scale an output channel and got one a tensor, as was asked.
    """

    slots: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    rescaled: list[str] = field(default_factory=list)


def stage(
    items: Iterable[Loaded],
    decisions: Sequence[Decision],
    spelling: Spelling,
    dtype: torch.dtype,
    *,
    anew: bool = False,
) -> Stage:
    """Collect a checkpoint's stream as the plan wants it: requantised or dequantised where the plan differs.

    `anew` says that the user asked for a format, and not for what the file holds. Without it a layer that has one FP8
    scale an output channel raises BackendUnavailable where its backend multiplies by one a tensor.
    """
    staged = Stage()
    decided = {bare(d.path): d for d in decisions}
    for item in items:
        path = from_original(spelling, item.path)
        if item.format is not None:
            _stage_weight(staged, decided[path], path, item, dtype, anew)
            continue
        module, _, leaf = path.rpartition(".")
        _stage_tensor(staged, decided[module], module, leaf, item.slots["tensor"], dtype)
    return staged


def _stage_tensor(
    staged: Stage, decision: Decision, module: str, leaf: str, tensor: torch.Tensor, dtype: torch.dtype
) -> None:
    if decision.action == "quantised" and leaf == "weight":
        staged.slots[module] = quantised(decision, tensor)
    else:
        held = dtype if decision.action == "linear" and leaf == "weight" else torch.float32
        staged.tensors.setdefault(module, {})[leaf] = tensor.to(held)


def _stage_weight(
    staged: Stage, decision: Decision, module: str, item: Loaded, dtype: torch.dtype, anew: bool
) -> None:
    assert item.format is not None
    if decision.format != item.format:
        weight = effective_weight(item.format, item.slots)
        _stage_tensor(staged, decision, module, "weight", weight, dtype)
        return
    staged.slots[module] = dict(item.slots)
    if not _too_fine(decision, item.slots):
        return
    if not anew:
        raise BackendUnavailable(
            f"backend={decision.backend!r} for {module}", {str(decision.backend): ONE_SCALE}
        )
    staged.slots[module] |= quantised(decision, FORMATS[item.format].dequantize(item.slots))
    staged.rescaled.append(module)


def _too_fine(decision: Decision, slots: Mapping[str, torch.Tensor]) -> bool:
    """Whether FP8 weights have one scale an output channel, and a backend that multiplies by one a tensor."""
    if decision.format != "fp8" or decision.backend is None or slots["scale"].numel() == 1:
        return False
    return not backend_named(decision.backend).per_channel


def quantised(decision: Decision, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A float weight in the format that was decided for it, its scales as fine as its backend takes them."""
    assert decision.format is not None and decision.backend is not None
    return FORMATS[decision.format].quantize(weight, backend_named(decision.backend).per_channel)
