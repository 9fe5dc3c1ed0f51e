"""What a checkpoint is, from its header and small markers: the value behind `inspect` and its table."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.names import noise_in
from wan_runtime.report import as_text


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in figures. `formats` and `kept` count modules and tensors; `odd` lists what a user should know."""

    path: str
    bytes: int
    variant: str
    sizes: Mapping[str, int | None]
    names: str
    prefix: str
    dialect: str
    evidence: str
    formats: Mapping[str, int]
    kept: Mapping[str, int]
    tensors: int
    input_scales: int
    odd: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        table = Table(title=self.path, show_header=False)
        table.add_row("model", self.variant)
        table.add_row("written by", f"{self.dialect}: {self.evidence}")
        table.add_row("names", self.names + (f", prefix {self.prefix!r}" if self.prefix else ""))
        table.add_row("quantised layers", _listed(self.formats) or "none")
        table.add_row("other tensors", _listed(self.kept))
        table.add_row("input scales", f"{self.input_scales} of {sum(self.formats.values())} layers")
        table.add_row("size", f"{self.bytes / 2**20:,.1f} MiB in {self.tensors} tensors")
        for note in self.odd:
            table.add_row("note", note)
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def inspect_checkpoint(path: Path | str, dialect: str | None = None) -> Inspection:
    """Open a file and describe it. Raises as open_checkpoint does."""
    checkpoint = open_checkpoint(path, dialect=dialect)
    header = checkpoint.header
    variant = dataclasses.asdict(checkpoint.variant)
    name = str(variant.pop("name"))
    return Inspection(
        path=str(header.path),
        bytes=header.nbytes,
        variant=name,
        sizes=variant,
        names=checkpoint.spelling.name,
        prefix=checkpoint.prefix,
        dialect=checkpoint.dialect.name,
        evidence=checkpoint.evidence,
        formats=dict(Counter(layer.format for layer in checkpoint.layers.values())),
        kept=dict(Counter(header.entries[key].dtype for key in checkpoint.plain.values())),
        tensors=len(header.entries),
        input_scales=sum(
            any(s.slot == "input_scale" for s in la.sources) for la in checkpoint.layers.values()
        ),
        odd=_odd(checkpoint),
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _odd(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is readable and still worth knowing."""
    entries = checkpoint.header.entries
    notes = list(checkpoint.header.notes)
    noise = noise_in(checkpoint.path)
    if noise is not None:
        notes.append(f"by its name it is the {noise}-noise expert of two; nothing in the file says so")
    norms = [k for p, k in checkpoint.plain.items() if ".norm" in p or p.endswith("modulation")]
    low = Counter(entries[k].dtype for k in norms if entries[k].dtype != "F32")
    if low:
        notes.append(
            f"norms and modulation are stored in {_listed(low)}, not fp32: what was rounded stays rounded"
        )
    biases = Counter(
        entries[k].dtype
        for p, k in checkpoint.plain.items()
        if p.endswith(".bias") and entries[k].dtype != "F32"
    )
    if biases:
        notes.append(f"biases are stored in {_listed(biases)}, not fp32")
    return tuple(notes)
