"""What a conversion did, as a value, as tables and as JSON; and which layers it hurt most."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wan_runtime.report import as_text, gib

SHOWN = 8  # layers listed without --sensitivity
OUTLYING = 3.0  # median absolute deviations above the median at which a layer's error stands out
LEAST = 1.1  # and times the median, so that layers alike to a few per cent do not
MOST = 0.1  # of the layers may be suggested: beyond, the format or the scales are the matter, not the layers


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of `convert`.

    counts  (action, reason, how many), in the words of wan_runtime.transcoding.Step.
    errors  original module path -> relative L2 distance between the new weight and the one read, for every layer that
            was quantised or requantised. For a requantised layer it comes on top of the source's own error.
    """

    source: str
    destination: str
    target: str
    variant: str
    source_dialect: str
    evidence: str
    dialect: str
    source_names: str
    names: str
    counts: tuple[tuple[str, str, int], ...]
    errors: Mapping[str, float]
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...] = ()

    def count(self, action: str) -> int:
        """How many layers or tensors were `exact`, `requantised`, `quantised`, `dequantised` or `kept`."""
        return sum(number for name, _, number in self.counts if name == action)

    @property
    def sensitivity(self) -> tuple[tuple[str, float], ...]:
        """(original module path, error), the worst first."""
        return tuple(sorted(self.errors.items(), key=lambda item: -item[1]))

    @property
    def suggested_keep(self) -> tuple[str, ...]:
        """The layers whose error stands out from the others', for `keep`; at most a tenth of them, the worst first."""
        if not self.errors:
            return ()
        median = statistics.median(self.errors.values())
        spread = statistics.median(abs(error - median) for error in self.errors.values())
        limit = max(median + OUTLYING * spread, LEAST * median)
        outlying = [path for path, error in self.sensitivity if error > limit]
        return tuple(outlying[: int(MOST * len(self.errors))])

    def to_dict(self) -> dict[str, object]:
        return {
            **dataclasses.asdict(self),
            "sensitivity": [{"layer": path, "error": error} for path, error in self.sensitivity],
            "suggested_keep": list(self.suggested_keep),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self, *, sensitivity: bool = False) -> RenderableType:
        """What became of the tensors, and the error of the layers: of a few, or with `sensitivity` of all."""
        caption = [
            f"{self.source_dialect} ({self.evidence}) -> {self.dialect}; names {self.source_names} -> {self.names}",
            f"{gib(self.bytes_before)} -> {gib(self.bytes_after)} in {self.seconds:.1f} s",
        ]
        table = Table(
            title=f"{self.destination}: {self.variant}, {self.target}",
            caption="\n".join((*caption, *self.notes)),
            caption_justify="left",
        )
        table.add_column("tensors", justify="right")
        table.add_column("were")
        table.add_column("why")
        for action, reason, count in self.counts:
            table.add_row(str(count), action, reason)
        if not self.errors:
            return table
        return Group(table, *self._errors(len(self.errors) if sensitivity else SHOWN, sensitivity))

    def _errors(self, shown: int, advise: bool) -> list[RenderableType]:
        median = statistics.median(self.errors.values())
        left = len(self.errors) - shown
        table = Table(
            title=f"Error added to the layers (relative L2): median {median:.4f}",
            title_justify="left",
            caption=f"{left} more layers are nearer; --sensitivity lists them" if left > 0 else None,
        )
        table.add_column("layer")
        table.add_column("error", justify="right")
        table.add_column("of the median", justify="right")
        for path, error in self.sensitivity[:shown]:
            table.add_row(path, f"{error:.4f}", f"{error / median:.2f}" if median else "-")
        return [table, *([Text(self._advice())] if advise else [])]

    def _advice(self) -> str:
        if not self.suggested_keep:
            return "No layer stands out: leaving single ones unquantised would gain little."
        flags = " ".join(f"--keep {path}" for path in self.suggested_keep)
        return f"Stand out, and are worth leaving unquantised:\n  {flags}"

    def __str__(self) -> str:
        return as_text(self.table())
