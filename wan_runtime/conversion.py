"""What a conversion did, as a value, as tables and as JSON; and which layers it hurt most."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wan_runtime.report import gib
from wan_runtime.result import Result

SHOWN = 8  # layers listed without --sensitivity
OUTLYING = 3.0  # median absolute deviations above the median at which a layer's error stands out
LEAST = 1.1  # and times the median, so that layers alike to a few per cent do not
MOST = 0.1  # of the layers may be suggested: beyond, the format or the scales are the matter, not the layers


@dataclass(frozen=True)
class Sensitivity(Result):
    """How much each layer lost by being quantised.

    errors  (original module path, relative L2 error), the worst first.
    """

    errors: tuple[tuple[str, float], ...]

    @property
    def median(self) -> float:
        """The median error, 0 without layers."""
        return statistics.median(error for _, error in self.errors) if self.errors else 0.0

    @property
    def keep(self) -> tuple[str, ...]:
        """The layers whose error stands out, for `keep`: at most a tenth of all, the worst first."""
        if not self.errors:
            return ()
        median = self.median
        spread = statistics.median(abs(error - median) for _, error in self.errors)
        limit = max(median + OUTLYING * spread, LEAST * median)
        outlying = [path for path, error in self.errors if error > limit]
        return tuple(outlying[: int(MOST * len(self.errors))])

    def to_dict(self) -> dict[str, object]:
        return {
            "median": self.median,
            "layers": [{"layer": path, "error": error} for path, error in self.errors],
            "keep": list(self.keep),
        }

    def table(self) -> RenderableType:
        """Every layer, and which to leave unquantised."""
        if not self.errors:
            return Text("No layer was quantised anew, so none lost anything.")
        if not self.keep:
            advice = "No layer stands out: leaving single ones unquantised would gain little."
        else:
            flags = " ".join(f"--keep {path}" for path in self.keep)
            advice = f"These stand out, and are worth leaving unquantised:\n  {flags}"
        return Group(self.rows(len(self.errors)), Text(advice))

    def rows(self, shown: int) -> Table:
        """The worst layers."""
        left = len(self.errors) - shown
        table = Table(
            title=f"Error added to the layers (relative L2): median {self.median:.4f}",
            title_justify="left",
            caption=f"{left} more layers have less; --sensitivity lists them" if left > 0 else None,
        )
        table.add_column("layer")
        table.add_column("error", justify="right")
        table.add_column("of the median", justify="right")
        for path, error in self.errors[:shown]:
            table.add_row(path, f"{error:.4f}", f"{error / self.median:.2f}" if self.median else "-")
        return table


@dataclass(frozen=True)
class ConversionReport(Result):
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
    def sensitivity(self) -> Sensitivity:
        """The layers' errors, the worst first, and which layers to keep."""
        return Sensitivity(tuple(sorted(self.errors.items(), key=lambda item: -item[1])))

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "sensitivity": self.sensitivity.to_dict()}

    def table(self) -> RenderableType:
        """What became of the tensors, and the layers that lost most."""
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
        return Group(table, self.sensitivity.rows(SHOWN)) if self.errors else table
