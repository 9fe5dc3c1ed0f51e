"""Which reading of a file is right, by the distance to the file its weights were made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_runtime.corrections import effective_weight
from wan_runtime.dialects import _swizzle
from wan_runtime.errors import CheckpointError
from wan_runtime.formats import Slots

LAYERS_COMPARED = 4  # enough to tell readings apart: a wrong one is off by 0.4 or more, the right one by 0.1
FARTHEST = 0.25
OPEN = ("nvfp4",)  # formats whose bytes can be read in several ways


@dataclass(frozen=True)
class Candidate:
    """One reading of a file: path of each layer -> its format, and what gives a layer's canonical slots."""

    formats: Mapping[str, str]
    slots: Callable[[str], Slots]


@dataclass(frozen=True)
class Reference:
    """The file the weights were made from: the modules it holds unquantised, and what gives one's weight."""

    path: Path
    modules: Collection[str]
    weight: Callable[[str], torch.Tensor]


def settle(
    path: Path, names: Sequence[str], read_as: Callable[[str], Candidate], reference: Reference
) -> tuple[str, str]:
    """Choose among readings -> the name of the one that is close, and the error of each in words.

    Raises CheckpointError when none is close or two are.
    """
    errors: dict[str, float] = {}
    found: dict[str, str] = {}
    first: tuple[str, Candidate] | None = None
    for name in names:
        try:
            candidate = read_as(name)
            errors[name] = distance(candidate, reference)
            found[name], first = f"{errors[name]:.3f}", first or (name, candidate)
        except CheckpointError as error:
            found[name] = str(error)
    listed = ", ".join(f"{name} {outcome}" for name, outcome in found.items())
    best = min(errors, key=lambda name: errors[name], default=None)
    rivals = [error for name, error in errors.items() if name != best]
    if best is None or not errors[best] <= FARTHEST or any(not 2 * errors[best] < e for e in rivals):
        raise CheckpointError(
            path,
            f"no reading is close to {reference.path} (relative error of each: {listed})"
            f"{_unread(first, reference)}; it is not the file these weights were made from.",
        )
    return best, f"nearest to {reference.path.name} (relative error: {listed})"


def confirm(path: Path, name: str, candidate: Candidate, reference: Reference) -> str:
    """Hold a marked file against its reference -> the error in words, "" where nothing can be compared.

    Raises CheckpointError when the marks' reading is far off and another arrangement of the same bytes is close.
    """
    shared = _shared(candidate, reference)
    if not shared:
        return ""
    errors = {words: _median(candidate, reference, shared, change) for words, change in ARRANGEMENTS.items()}
    own = errors["as it is read"]
    best = min(errors, key=lambda words: errors[words])
    if own > FARTHEST >= errors[best]:
        listed = ", ".join(f"{words} {error:.3f}" for words, error in errors.items())
        raise CheckpointError(
            path,
            f"its marks say {name}, and {reference.path} says otherwise (relative error of each arrangement: "
            f"{listed}). Its marks are wrong: name the dialect that reads it with --dialect.",
        )
    return f"relative error to {reference.path.name} {own:.3f}"


def _swapped(slots: Slots) -> Slots:
    return {**slots, "payload": (slots["payload"] >> 4) | (slots["payload"] << 4)}


def _moved(order: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Slots], Slots]:
    """The block scales in another order, where both orders have one shape."""

    def change(slots: Slots) -> Slots:
        rows, cols = slots["block_scale"].shape
        if (rows, cols) != _swizzle.padded(rows, cols):
            return slots
        return {**slots, "block_scale": order(slots["block_scale"])}

    return change


def _unswizzled(scales: torch.Tensor) -> torch.Tensor:
    return _swizzle.unswizzle(scales, *scales.shape)


_TILED, _UNTILED = _moved(_swizzle.swizzle), _moved(_unswizzled)
ARRANGEMENTS: Mapping[str, Callable[[Slots], Slots]] = {
    "as it is read": lambda slots: slots,
    "nibbles swapped": _swapped,
    "scales taken for swizzled": _UNTILED,
    "scales taken for plain": _TILED,
    "nibbles swapped and scales taken for swizzled": lambda slots: _swapped(_UNTILED(slots)),
    "nibbles swapped and scales taken for plain": lambda slots: _swapped(_TILED(slots)),
}


def _unread(read: tuple[str, Candidate] | None, reference: Reference) -> str:
    """Words for an arrangement that would be close although no dialect reads it."""
    if read is None:
        return ""
    name, candidate = read
    shared = _shared(candidate, reference)
    errors = {words: _median(candidate, reference, shared, change) for words, change in ARRANGEMENTS.items()}
    best = min(errors, key=lambda words: errors[words])
    return f"; read as {name} with {best} it would be {errors[best]:.3f}" if errors[best] <= FARTHEST else ""


def distance(candidate: Candidate, reference: Reference) -> float:
    """The median relative L2 error over a few layers that can be read in several ways and are in both files."""
    shared = _shared(candidate, reference)
    if not shared:
        raise CheckpointError(
            reference.path,
            "it holds none of the quantised layers unquantised, so it cannot be a reference.",
        )
    return _median(candidate, reference, shared, ARRANGEMENTS["as it is read"])


def _shared(candidate: Candidate, reference: Reference) -> list[str]:
    shared = [p for p, name in candidate.formats.items() if name in OPEN and p in reference.modules]
    return shared[:: max(len(shared) // LAYERS_COMPARED, 1)][:LAYERS_COMPARED]


def _median(
    candidate: Candidate, reference: Reference, paths: Sequence[str], change: Callable[[Slots], Slots]
) -> float:
    errors = []
    for path in paths:
        weight = effective_weight(candidate.formats[path], change(candidate.slots(path)))
        truth = reference.weight(path).float()
        if truth.shape != weight.shape:
            raise CheckpointError(
                reference.path,
                f"{path}.weight has shape {list(truth.shape)}, not {list(weight.shape)}.",
            )
        errors.append(float((weight - truth).norm() / truth.norm()))
    return sorted(errors)[len(errors) // 2]
