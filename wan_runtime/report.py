"""What a patch did, as a value, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.table import Table

from wan_runtime.plan import Decision
from wan_runtime.result import Result


@dataclass(frozen=True)
class Report(Result):
    """The outcome of `patch`.

    device        where the plan was made for; on another device type a layer dequantises and multiplies there.
    bytes_before  bytes of parameters before the patch (on meta: what they would have taken).
    bytes_after   bytes of parameters after it.
    notes         sentences a user should read: what fell back and why, what was odd in the file.
    attention     the implementation that every attention uses (wan_runtime.attention), or None for the host's own.
    fused         whether the blocks run on fused kernels.
    already       the model was patched before and nothing was done; the fields are the first patch's.
    """

    host: str
    device: str
    dtype: str
    decisions: tuple[Decision, ...]
    bytes_before: int
    bytes_after: int
    checkpoint: str | None = None
    variant: str | None = None
    dialect: str | None = None
    evidence: str | None = None
    notes: tuple[str, ...] = ()
    attention: str | None = None
    fused: bool = False
    already: bool = False

    @property
    def quantised(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.action == "quantised")

    def table(self) -> Table:
        """Rows of like layers: how many, what they hold, who multiplies."""
        title = f"{self.host} on {self.device}" + (f", {self.variant}" if self.variant else "")
        caption = f"parameters {gib(self.bytes_before)} -> {gib(self.bytes_after)}, computing in {self.dtype}"
        own = "the host's own"
        caption += f"; attention: {self.attention or own}; block forward: {'fused' if self.fused else own}"
        if self.already:
            title += " (patched before; nothing was done)"
        if self.dialect:
            caption = f"{self.checkpoint}: {self.dialect}, {self.evidence}\n{caption}"
        table = Table(title=title, caption="\n".join((caption, *self.notes)), caption_justify="left")
        for heading in ("layers", "held as", "computed in", "by", "why"):
            table.add_column(heading, justify="right" if heading == "layers" else "left")
        for row, count in _rows(self.decisions).items():
            table.add_row(str(count), *row)
        return table


def _rows(decisions: tuple[Decision, ...]) -> Counter[tuple[str, str, str, str]]:
    held = {"resident": "fp32", "own": "fp32", "model": "fp32", "linear": "compute dtype, fp32 bias"}
    return Counter(
        (
            d.format or held[d.action],
            d.compute or ("fp32" if d.action != "linear" else "compute dtype"),
            d.backend or "host",
            d.reason,
        )
        for d in decisions
    )


def gib(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
