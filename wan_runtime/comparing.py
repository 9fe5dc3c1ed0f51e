"""`compare`: two checkpoints side by side, what a host made for the first would do with the second, and what to do.

Everything but `errors` comes from the two headers. A file whose dialect is undecided is still compared: its readings
are listed, as the question between them is often the very reason to compare.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wan_runtime import rules
from wan_runtime.anatomy import Anatomy, anatomy_of
from wan_runtime.aspects import Row, aspects
from wan_runtime.checkpoint import Checkpoint, open_checkpoint, read_layer, read_plain
from wan_runtime.corrections import effective_weight
from wan_runtime.diagnosis import Finding, findings, remedies
from wan_runtime.errors import BadTensor, InvalidOption
from wan_runtime.result import Result

LAYER = "blocks.0.cross_attn.k"
NEAR = 0.25  # median distance: formats differ by 0.03 (FP8) to 0.1 (NVFP4), a wrong reading by 0.4 or more
SHOWN = 12  # layers listed in the table of errors, the worst first


@dataclass(frozen=True)
class Comparison(Result):
    """Two files in facts, differences and advice.

    layer     the representative layer, in the original spelling.
    rows      (aspect, in a, in b, what the difference does; empty where they agree).
    findings  what a host made for `a` would get wrong with `b`, each with what to do about it.
    remedies  what to do with `b` as a whole, with the command to run.
    errors    only when asked for: reading of b -> original module path -> relative L2 distance from a's weight.
    refusals  readings of b whose values are impossible -> what is wrong with them; only with errors.
    """

    a: Anatomy
    b: Anatomy
    layer: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    remedies: tuple[str, ...]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)

    @property
    def causes(self) -> tuple[str, ...]:
        """What a host made for `a` would get wrong with `b`."""
        return tuple(finding.cause for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        names = ("aspect", "a", "b", "impact")
        return {
            "layer": self.layer,
            "a": self.a.to_dict(self.layer),
            "b": self.b.to_dict(self.layer),
            "aspects": [dict(zip(names, row, strict=True)) for row in self.rows],
            "causes": list(self.causes),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "remedies": list(self.remedies),
            "errors": {reading: dict(errors) for reading, errors in self.errors.items()},
            "refusals": dict(self.refusals),
        }

    def table(self) -> Group:
        """The tables that the command prints: the layer, the aspects, the errors, the causes and what to do."""
        parts: list[RenderableType] = [_layer_table(self), _aspect_table(self.rows)]
        parts += [_error_table(reading, errors) for reading, errors in self.errors.items()]
        refused = [f"{reading}: {problem}" for reading, problem in self.refusals.items()]
        parts += [_numbered("Readings of B whose values are impossible", refused)] if refused else []
        found = [f"{finding.cause}\nWhat to do: {finding.remedy}" for finding in self.findings]
        parts.append(_numbered("What a host made for A would get wrong with B", found or ("Nothing.",)))
        parts.append(_numbered("What to do", self.remedies))
        return Group(*parts)


def compare(a: Path | str, b: Path | str, *, layer: str | None = None, errors: bool = False) -> Comparison:
    """Compare two WAN checkpoints by their headers.

    Args:
        a: the file that works, or that a host was made for.
        b: the file in question.
        layer: the layer to show, in the original spelling; default blocks.0.cross_attn.k.
        errors: read the weights too, and give each layer's relative L2 distance, for every reading that fits `b`.

    Raises CheckpointError when one is not a readable WAN checkpoint, InvalidOption for a layer that they do not share
    or for `errors` between different models.
    """
    first, second = anatomy_of(a), anatomy_of(b)
    shown = _layer(first, second, layer)
    found, refusals = _errors(first, second) if errors else ({}, {})
    return Comparison(
        a=first,
        b=second,
        layer=shown,
        rows=aspects(first, second, shown),
        findings=findings(first, second, shown),
        remedies=remedies(first, second, _settled(found)),
        errors=found,
        refusals=refusals,
    )


def _layer(a: Anatomy, b: Anatomy, named: str | None) -> str:
    shared = [path for path in a.layers if path in b.layers]
    if named is None:
        if not shared:
            raise InvalidOption(f"{a.path} and {b.path} have no block Linear in common: different models?")
        return LAYER if LAYER in shared else shared[0]
    if named not in shared:
        raise InvalidOption(
            f"layer={named!r} is not a block Linear of both files; it is spelled as in {LAYER!r}."
        )
    return named


def _settled(errors: Mapping[str, Mapping[str, float]]) -> str | None:
    """The one reading under which B's weights are A's, where the weights were read and there is exactly one."""
    near = [reading for reading, found in errors.items() if statistics.median(found.values()) <= NEAR]
    return near[0] if len(near) == 1 else None


def _errors(a: Anatomy, b: Anatomy) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    if a.decided is None:
        raise InvalidOption(
            f"how {a.path} is to be read is undecided, so it is no measure; put the known file first."
        )
    known = open_checkpoint(a.path)
    found, refusals = {}, {}
    for reading in b.readings:
        try:
            found[reading.dialect] = _distances(known, open_checkpoint(b.path, dialect=reading.dialect))
        except BadTensor as bad:  # values that this reading cannot mean
            refusals[reading.dialect] = str(bad)
    return found, refusals


def _distances(a: Checkpoint, b: Checkpoint) -> dict[str, float]:
    """Of every layer that either file holds quantised; of every block Linear where neither does."""
    paths = list(dict.fromkeys((*a.layers, *b.layers)))
    paths = paths or [p.removesuffix(".weight") for p in a.plain if rules.swaps(p.removesuffix(".weight"))]
    distances = {}
    for path in paths:
        truth, weight = _weight(a, path), _weight(b, path)
        if truth.shape != weight.shape:
            raise InvalidOption(
                f"{path} is {list(truth.shape)} in {a.path} and {list(weight.shape)} in {b.path}: different models."
            )
        apart, size = (weight - truth).norm().item(), truth.norm().item()
        distances[path] = apart / size if size else math.inf if apart else 0.0
    return distances


def _weight(checkpoint: Checkpoint, path: str) -> torch.Tensor:
    """The weight as fp32 [out, in]."""
    if path in checkpoint.layers:
        return effective_weight(checkpoint.layers[path].format, read_layer(checkpoint, path))
    if f"{path}.weight" not in checkpoint.plain:
        raise InvalidOption(f"{checkpoint.path} has no {path}: the two are different models.")
    return read_plain(checkpoint, f"{path}.weight").float()


def _layer_table(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.layer}", title_justify="left", show_lines=True)
    table.add_column("tensor", no_wrap=True)
    sides = (comparison.a, comparison.b)
    for letter, side in zip("AB", sides, strict=True):
        table.add_column(f"{letter}: {Path(side.path).name}")
    parts = [side.layers[comparison.layer].entries for side in sides]
    for leaf in dict.fromkeys((*parts[0], *parts[1])):
        cells = [f"{own[leaf].dtype} {list(own[leaf].shape)}" if leaf in own else "-" for own in parts]
        table.add_row(f".{leaf}", *cells)
    return table


def _aspect_table(rows: tuple[Row, ...]) -> Table:
    table = Table(show_lines=True)
    for heading in ("aspect", "A", "B", "impact"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


def _error_table(reading: str, errors: Mapping[str, float]) -> Table:
    worst = sorted(errors, key=lambda path: -errors[path])
    table = Table(
        title=f"Distance of B from A, read as {reading} (relative L2): median {statistics.median(errors.values()):.4f}",
        title_justify="left",
        caption=f"{len(worst) - SHOWN} more layers are nearer" if len(worst) > SHOWN else None,
    )
    table.add_column("layer")
    table.add_column("distance", justify="right")
    for path in worst[:SHOWN]:
        table.add_row(path, f"{errors[path]:.4f}")
    return table


def _beneath(line: str) -> Text:
    command = line.startswith("wan-runtime ")
    return Text(f"      {line}", no_wrap=command, overflow="ignore" if command else None)


def _numbered(title: str, sentences: Sequence[str]) -> Group:
    """A list; what follows a sentence on a line of its own is a command, and is not broken."""
    lines = [Text(title, style="italic")]
    for number, sentence in enumerate(sentences, 1):
        first, *more = sentence.split("\n")
        lines.append(Text(f" {number}. {first}"))
        lines += [_beneath(line) for line in more]
    return Group(*lines)
