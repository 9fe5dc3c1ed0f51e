"""Two experts: which file is which, and, in an armed run, which takes the place of which of the script's sources.

Nothing in a file says which expert it is: keys and shapes are the same. Names of folders and files do, and are
evidence: the caller's word decides, and where a name contradicts it nothing is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wan_runtime.checkpoint import Checkpoint, read_plain
from wan_runtime.errors import InvalidOption
from wan_runtime.names import NOISE, noise_in
from wan_runtime.report import Report

LOW_NOISE = (
    "transformer_2",
    "low_noise_model",
)  # where diffusers and the original release keep the second expert
MISSING = object()


@dataclass
class Armed:
    """What `install` did: the models patched so far, and the way back.

    checkpoints  the high-noise (or only) file and the low-noise file; None quantises what the script loads.
    options      for `patch`, as they are.
    reports      one a model, in the order they were patched.
    """

    checkpoints: tuple[Path | None, Path | None]
    options: Mapping[str, Any]
    announce: Callable[[Report], None]
    reports: list[Report] = field(default_factory=list)
    _used: set[Path] = field(default_factory=set)
    _sources: dict[bool, str] = field(default_factory=dict)  # low-noise or not: what the script took it from
    replaced: list[tuple[type, str, object]] = field(default_factory=list)

    def undo(self) -> None:
        """Take the hook and the doors away. Models patched meanwhile stay patched."""
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "armed", None) is not self]
        for cls, name, before in reversed(self.replaced):
            if before is MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, before)
        self.replaced.clear()

    def checkpoint_for(self, low_noise: bool) -> Path | None:
        """The file for one expert; two experts and one file is an error, since no file holds both."""
        high, low = self.checkpoints
        if low_noise and high is not None and low is None:
            raise InvalidOption(
                f"the script loads two experts and one checkpoint was given ({high}"
                + (f", used in place of {self._sources[False]}" if self._sources else "")
                + "). Give the low-noise expert's file as checkpoint_low (--checkpoint-low)."
            )
        return low if low_noise else high

    def note(self, report: Report, checkpoint: Path | None, source: str, low_noise: bool) -> None:
        self.reports.append(report)
        self._sources.setdefault(low_noise, source)  # only now: a load that failed took no expert
        if checkpoint is not None:
            self._used.add(checkpoint)
        self.announce(report)

    def unused(self) -> list[Path]:
        """Files that no model was loaded from."""
        return [path for path in self.checkpoints if path is not None and path not in self._used]


def expert_of(armed: Armed, source: str, *names: str) -> bool:
    """Whether what the script takes from `source` is the low-noise expert; every door asks here.

    A source keeps the expert it was the first time. Else the first of `names` that tells decides; else the first source
    is the high-noise expert, which hosts load and sample with first, and another source is the low-noise one. Raises
    InvalidOption when that expert came from another source: one of the two would get weights that are not its own.
    """
    high, low = armed.checkpoints
    if high is None:
        return False  # each model keeps its own weights
    for low_noise, taken in armed._sources.items():
        if taken == source:
            return low_noise
    low_noise = False in armed._sources
    for name in names:
        match = (
            NOISE.search(name) if low is not None else None
        )  # one file may be for a low-noise expert alone
        if name in LOW_NOISE or match:
            low_noise = name in LOW_NOISE or (match is not None and match[1].lower() == "low")
            break
    if low_noise in armed._sources:
        raise InvalidOption(
            f"the script loads {source} after {' and '.join(armed._sources.values())}, and "
            f"{armed.checkpoint_for(low_noise)} is in place of {armed._sources[low_noise]} already. checkpoint and "
            "checkpoint_low are one high-noise and one low-noise expert: run the script with one model at a time."
        )
    return low_noise


def source_of(path: Any, subfolder: Any = None) -> tuple[str, str]:
    """What a path is known by, however it is written, and its last name as the script wrote it."""
    whole = Path(str(path), str(subfolder or ""))
    return str(whole.resolve()) if whole.exists() else str(whole), whole.name


def nameless(armed: Armed) -> str:
    """A source of its own for a model that came from no path."""
    return f"model {len(armed.reports) + 1} (which it fills itself)"


def refuse_twins(high: Checkpoint, low: Checkpoint) -> None:
    """Refuse one expert given as both, two different models, and two files whose names say that they are exchanged.

    Experts are trained apart, so their norms and modulations differ. No producer quantises those or corrects them for
    its rounding, as some do biases; two files in which all are equal in bf16 hold one expert, whatever their formats.

    Raises InvalidOption.
    """
    for role, checkpoint, other in (("high", high, "low"), ("low", low, "high")):
        if noise_in(checkpoint.path) == other:
            raise InvalidOption(
                f"{checkpoint.path} is given as the {role}-noise expert, and its name says {other} noise. The "
                "high-noise file goes with checkpoint (--checkpoint), the low-noise one with checkpoint_low "
                "(--checkpoint-low)."
            )
    if high.path.resolve() == low.path.resolve() or high.path.samefile(low.path):
        raise InvalidOption(f"both experts are the same file, {high.path}. {_TWO}")
    if high.variant != low.variant:
        raise InvalidOption(
            f"the two experts are different models: {high.path} is a {high.variant.name}, {low.path} a "
            f"{low.variant.name}."
        )
    shared = [tensor for tensor in high.plain if tensor in low.plain and _small(tensor)]
    if shared and all(_equal(high, low, tensor) for tensor in shared):
        raise InvalidOption(
            f"{high.path} and {low.path} are one expert: {shared[0]} and {len(shared) - 1} more of the tensors that no "
            f"producer quantises are equal in both. {_TWO}"
        )


_TWO = (
    "A model of two experts needs its high-noise and its low-noise file; with one file twice every clip is made by one "
    "expert, which is wrong at half of the steps."
)


def _small(tensor: str) -> bool:
    return tensor.endswith("modulation") or ".norm" in tensor


def _equal(high: Checkpoint, low: Checkpoint, tensor: str) -> bool:
    return torch.equal(read_plain(high, tensor).bfloat16(), read_plain(low, tensor).bfloat16())
