"""What can be told of a checkpoint that nobody may read: what is in it, and what each dialect would make of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_runtime import gpus, prospects
from wan_runtime.anatomy import block_linear
from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.containers import read_header
from wan_runtime.deciding import contradiction
from wan_runtime.errors import AmbiguousDialect, CheckpointError, UnknownDialect, UnreadDialect
from wan_runtime.inspecting import Inspection, describe, end_table, listed
from wan_runtime.names import naming_of, to_original
from wan_runtime.result import Result

if TYPE_CHECKING:
    from rich.table import Table


BLOCK = "block Linears'"


@dataclass(frozen=True)
class Claim:
    """What a file would be in one dialect that fits it.

    formats  how many layers would be quantised, by format.
    against  what speaks against it, or None: that the file cannot even be read so, or what its weights say by a wide
             margin.
    """

    meaning: str
    formats: Mapping[str, int]
    against: str | None


@dataclass(frozen=True)
class Undecided(Result):
    """A checkpoint whose dialect is not known, in figures.

    variant  the model, where every dialect that fits makes it the same one.
    kinds    kind of tensor -> dtype -> how many.
    claims   dialect -> the file in it; none where no dialect fits.
    tool     who wrote it, where that is known and its files are not read.
    runs     format of any claim -> how it would be multiplied on this machine; `machine` says on what.
    notes    what a user should know, whatever the dialect is.
    error    why it was refused, and what to do.
    """

    path: str
    bytes: int
    tensors: int
    variant: str | None
    names: str
    prefix: str
    kinds: Mapping[str, Mapping[str, int]]
    claims: Mapping[str, Claim]
    tool: str | None
    machine: str
    runs: Mapping[str, str]
    notes: tuple[str, ...]
    error: str

    def table(self) -> Table:
        """Everything but the error, which is a sentence of its own."""
        from rich.table import Table

        table = Table(title=self.path, show_header=False)
        table.add_row("model", self.variant or "not known: no reading of the file tells it")
        fit = f"{len(self.claims)} dialects fit" if self.claims else "no dialect fits"
        table.add_row("written by", f"{self.tool}, not read" if self.tool else f"undecided: {fit}")
        for name, claim in self.claims.items():
            table.add_row(f"  if {name}", claim.meaning)
            if claim.formats:
                table.add_row("    quantised layers", listed(claim.formats))
            if claim.against:
                table.add_row("    against it", claim.against)
        table.add_row("names", self.names + (f", prefix {self.prefix!r}" if self.prefix else ""))
        for kind, dtypes in self.kinds.items():
            table.add_row(kind, listed(dtypes))
        end_table(table, self.bytes, self.tensors, self.machine, self.runs, self.notes)
        return table

    def __str__(self) -> str:
        return f"{super().__str__()}{self.error}\n"


def describe_undecided(refused: AmbiguousDialect | UnknownDialect) -> Undecided:
    """Describe the file that was refused: from its header, and for each dialect that fits from a few layers' weights.

    Raises CheckpointError where the file has gone or changed meanwhile.
    """
    header = read_header(refused.path)
    spelling, prefix = naming_of(header.path, header.entries)
    kinds: dict[str, Counter[str]] = {}
    for key, entry in header.entries.items():
        kinds.setdefault(_kind(to_original(spelling, key.removeprefix(prefix))), Counter())[entry.dtype] += 1
    candidates = refused.candidates if isinstance(refused, AmbiguousDialect) else {}
    read = {name: _read(header.path, name, meaning) for name, meaning in candidates.items()}
    fitting = [one for one, _ in read.values() if one is not None]
    variants = {one.variant for one in fitting}
    driver = gpus.driver()
    return Undecided(
        path=str(header.path),
        bytes=header.nbytes,
        tensors=len(header.entries),
        variant=variants.pop() if len(variants) == 1 else None,
        names=spelling.name,
        prefix=prefix,
        kinds={kind: dict(kinds[kind].most_common()) for kind in sorted(kinds, key=_order)},
        claims={name: claim for name, (_, claim) in read.items()},
        tool=refused.tool if isinstance(refused, UnreadDialect) else None,
        machine=prospects.machine(driver),
        runs={name: how for one in fitting for name, how in one.runs.items()},
        notes=tuple(dict.fromkeys(note for one in fitting for note in one.odd)),
        error=str(refused),
    )


def _read(path: Path, dialect: str, meaning: str) -> tuple[Inspection | None, Claim]:
    """The file in a dialect that claims it, where it can be read so, and what there is to say of that."""
    try:
        checkpoint = open_checkpoint(path, dialect=dialect)
        found = describe(dataclasses.replace(checkpoint, insisted=False))  # nobody did
        layers = {layer.module: layer for layer in checkpoint.layers.values()}
        return found, Claim(meaning, found.formats, contradiction(checkpoint.header, layers))
    except CheckpointError as error:
        return None, Claim(meaning, {}, str(error).removeprefix(f"{path}: "))


def _order(kind: str) -> tuple[bool, str]:
    """What was quantised first: it is what the question is about."""
    return not kind.startswith(BLOCK), kind


def _kind(path: str) -> str:
    """The kind of a tensor by its path in the original spelling, in the words of the table."""
    if ".norm" in path:
        return "norms"
    if path.endswith(".bias"):
        return "biases"
    if path.endswith("modulation"):
        return "modulation"
    module = block_linear(path)
    return "other tensors" if module is None else f"{BLOCK} {path.removeprefix(module)}"
