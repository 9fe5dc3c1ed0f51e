"""What a checkpoint is, from its header and small markers: the value behind `inspect` and its table."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_runtime import gpus, prospects, rules
from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.names import noise_in
from wan_runtime.result import Result

if TYPE_CHECKING:
    from rich.table import Table

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Inspection(Result):
    """A checkpoint in figures.

    formats  how many layers are quantised, by format.
    high     block Linears that are not: (name in the block) -> the blocks, as "0-2, 39".
    kept     how many other tensors there are, by dtype.
    runs     format -> how it would be multiplied on this machine, and how fast that is; `machine` says on what.
    odd      what a user should know.
    """

    path: str
    bytes: int
    variant: str
    sizes: Mapping[str, int | None]
    names: str
    prefix: str
    dialect: str
    evidence: str
    formats: Mapping[str, int]
    high: Mapping[str, str]
    kept: Mapping[str, int]
    tensors: int
    input_scales: int
    machine: str
    runs: Mapping[str, str]
    odd: tuple[str, ...]

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=self.path, show_header=False)
        table.add_row("model", self.variant)
        table.add_row("written by", f"{self.dialect}: {self.evidence}")
        table.add_row("names", self.names + (f", prefix {self.prefix!r}" if self.prefix else ""))
        table.add_row("quantised layers", listed(self.formats) or "none")
        for blocks, names in _by_blocks(self.high).items() if self.formats else ():
            table.add_row("left unquantised", f"{', '.join(names)} in blocks {blocks}")
        table.add_row("other tensors", listed(self.kept))
        table.add_row("input scales", f"{self.input_scales} of {sum(self.formats.values())} layers")
        end_table(table, self.bytes, self.tensors, self.machine, self.runs, self.odd)
        return table


def inspect_checkpoint(
    path: Path | str, dialect: str | None = None, reference: Path | str | None = None
) -> Inspection:
    """Open a file and describe it. Raises as open_checkpoint does."""
    return describe(open_checkpoint(path, dialect=dialect, reference=reference))


def describe(checkpoint: Checkpoint) -> Inspection:
    """An opened file in figures."""
    header = checkpoint.header
    variant = dataclasses.asdict(checkpoint.variant)
    name = str(variant.pop("name"))
    formats = dict(Counter(layer.format for layer in checkpoint.layers.values()))
    driver = gpus.driver()
    return Inspection(
        path=str(header.path),
        bytes=header.nbytes,
        variant=name,
        sizes=variant,
        names=checkpoint.spelling.name,
        prefix=checkpoint.prefix,
        dialect=checkpoint.dialect.name,
        evidence=checkpoint.evidence,
        formats=formats,
        high=_high(checkpoint),
        kept=dict(Counter(header.entries[key].dtype for key in checkpoint.plain.values())),
        tensors=len(header.entries),
        input_scales=sum(
            any(s.slot == "input_scale" for s in la.sources) for la in checkpoint.layers.values()
        ),
        machine=prospects.machine(driver),
        runs=prospects.classes(formats, driver),
        odd=(*_odd(checkpoint), *_uneven(checkpoint), *_tight(header.nbytes, driver)),
    )


def end_table(
    table: Table, size: int, tensors: int, machine: str, runs: Mapping[str, str], notes: Iterable[str]
) -> None:
    """The rows that a file's table ends with: how large it is, how it would run here, and what a user should know."""
    table.add_row("size", f"{size / 2**20:,.1f} MiB in {tensors} tensors")
    table.add_row("here", machine)
    for name, how in runs.items():
        table.add_row(f"  {name}", how)
    for note in notes:
        table.add_row("note", note)


def listed(counts: Mapping[str, int]) -> str:
    """Counts in words: "300 x fp8, 6 x bf16"; nothing of none."""
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _high(checkpoint: Checkpoint) -> dict[str, str]:
    found: dict[str, list[int]] = {}
    for path in checkpoint.plain:
        match = BLOCK.fullmatch(path.removesuffix(".weight"))
        if match and path.endswith(".weight") and rules.swaps(match[0]):
            found.setdefault(match[2], []).append(int(match[1]))
    return {name: _ranges(blocks) for name, blocks in sorted(found.items())}


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as "0-2, 39"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _by_blocks(high: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, blocks in high.items():
        grouped.setdefault(blocks, []).append(name)
    return grouped


def _uneven(checkpoint: Checkpoint) -> Sequence[str]:
    """Blocks without a tensor that most have, and block numbers that are skipped: no model fits such a file."""
    tensors = (*checkpoint.plain, *(f"{path}.weight" for path in checkpoint.layers))
    held: dict[int, set[str]] = {}
    for path in tensors:
        match = BLOCK.fullmatch(path)
        if match:
            held.setdefault(int(match[1]), set()).add(match[2])
    notes = []
    skipped = sorted(set(range(max(held, default=-1) + 1)) - held.keys())
    if skipped:
        notes.append(f"blocks {_ranges(skipped)} are missing; loading will be refused")
    counts = Counter(name for names in held.values() for name in names)
    common = {name for name, count in counts.items() if 2 * count > len(held)}
    lacking = {number: common - names for number, names in held.items() if common - names}
    if lacking:
        number, names = next(iter(sorted(lacking.items())))
        notes.append(
            f"blocks {_ranges(lacking)} lack tensors that the others have, such as blocks.{number}.{min(names)}; "
            "loading will be refused"
        )
    return notes


def _tight(size: int, driver: gpus.Driver | None) -> Sequence[str]:
    if driver is None or not driver.gpus or size < driver.gpus[0].memory:
        return ()
    return (
        "the weights alone are larger than the GPU's memory: use the host's offload (pipe.enable_model_cpu_offload)",
    )


def _odd(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is readable and still worth knowing."""
    entries = checkpoint.header.entries
    notes = list(checkpoint.header.notes)
    if checkpoint.insisted:  # only then are weights read, and torch imported
        from wan_runtime.fitting import doubted

        notes += filter(None, (doubted(checkpoint),))
    noise = noise_in(checkpoint.path)
    if noise is not None:
        notes.append(f"by its name it is the {noise}-noise expert of two; nothing in the file says so")
    norms = [k for p, k in checkpoint.plain.items() if ".norm" in p or p.endswith("modulation")]
    low = Counter(entries[k].dtype for k in norms if entries[k].dtype != "F32")
    if low:
        notes.append(
            f"norms and modulation are stored in {listed(low)}, not fp32: what was rounded stays rounded"
        )
    biases = Counter(
        entries[k].dtype
        for p, k in checkpoint.plain.items()
        if p.endswith(".bias") and entries[k].dtype != "F32"
    )
    if biases:
        notes.append(f"biases are stored in {listed(biases)}, not fp32")
    return tuple(notes)
