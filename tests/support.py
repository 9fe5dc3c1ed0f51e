"""`python -m tests.support`: writes the tables of docs/support.md, by asking the backends' own rules.

What a kind of GPU multiplies is found by a probe where it is. Here its answers are taken as known, for each kind by one
of `KNOWN`'s ways, and everything else is decided by the code that decides in use: `computes`, `refuses`, `choose`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from wan_runtime.backends import (
    AUTOMATIC,
    BACKENDS,
    _block_scaled,
    backend_named,
    torch_native,
    transformer_engine,
)
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.plan import Options, choose

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
MARK = "<!-- What follows is written by: python -m tests.support -->\n"
SHAPE = (5120, 13824)
CUDA = torch.device("cuda", 0)
NOT_HERE = "a test product failed: this kind of GPU has none"


@dataclass(frozen=True)
class Kind:
    """One kind of device.

    products  the computes whose probe passes there, of torch's own products; te: of Transformer Engine's.
    known     compute -> how that is known, where it is not as `otherwise`; te_known: the same of Transformer Engine.
    """

    name: str
    device: torch.device
    products: frozenset[str] = frozenset()
    known: dict[str, str] = field(default_factory=dict)
    otherwise: str = "claimed"
    hip: str | None = None
    te: frozenset[str] = frozenset()
    te_known: str = "claimed"


# What Transformer Engine itself says where it has no such product (transformer_engine/pytorch/quantization.py, 2.20.2).
TE_SAYS = {
    "fp8": "Device compute capability 8.9 or higher required for FP8 execution",
    "mxfp8": "Device compute capability 10.0 or higher required for MXFP8 execution",
    "nvfp4": "Device compute capability 10.0 or higher required for NVFP4 execution",
}
TE_SAYS_OF_SM_120 = "MXFP8 (for all gemm layouts) is not supported on 12.0+ architectures yet"
FP8 = frozenset({"fp8"})
BLACKWELL = frozenset({"fp8", "nvfp4", "mxfp8"})
MODELLED = {"nvfp4": "modelled", "mxfp8": "modelled"}
KINDS = (
    Kind("CPU", torch.device("cpu"), otherwise="run"),
    Kind("before Ada", CUDA),
    Kind("Ada (sm_89)", CUDA, FP8, te=FP8),
    Kind("Hopper (sm_90)", CUDA, FP8, otherwise="run", te=FP8, te_known="run"),
    Kind("Blackwell (sm_100)", CUDA, BLACKWELL, MODELLED, te=BLACKWELL),
    Kind("Blackwell (sm_120)", CUDA, BLACKWELL, MODELLED, te=frozenset({"fp8", "nvfp4"})),
    Kind("AMD (ROCm)", CUDA, FP8, hip="6.4"),
    Kind("Apple", torch.device("mps"), known={"fp32": "modelled"}),
)


@contextlib.contextmanager
def standing_on(kind: Kind) -> Iterator[None]:
    """The backends as they answer on a kind of device: the probes' outcomes are given, and nothing else."""

    def probe(weight_format: str, index: int) -> str | None:
        return None if "fp8" in kind.products else NOT_HERE

    def blocks(compute: str, index: int) -> str | None:
        return None if compute in kind.products else NOT_HERE

    def engine(compute: str, index: int) -> str | None:
        return None if compute in kind.te else TE_SAYS_OF_SM_120 if kind.te > FP8 else TE_SAYS[compute]

    with (
        mock.patch.object(transformer_engine, "_installed", lambda: True),
        mock.patch.object(transformer_engine, "_probe", engine),
        mock.patch.object(torch_native, "_probe", probe),
        mock.patch.object(_block_scaled, "refuses", blocks),
        mock.patch.object(torch.version, "hip", kind.hip),
    ):
        yield


def cell(kind: Kind, weight_format: str, backend: str) -> str:
    """native, expanded, stored only or refused; and how it is known."""
    with standing_on(kind):
        try:
            _, compute, _ = choose(weight_format, kind.device, SHAPE, Options(backend=backend))
        except BackendUnavailable:
            return "refused"
    known = kind.te_known if backend == "te" else kind.known.get(compute, kind.otherwise)
    return f"{word(weight_format, compute)}, {known}"


def word(weight_format: str, compute: str) -> str:
    """What a compute does with a format's codes: multiplies them, others made of them, or floating-point numbers."""
    if compute in ("bf16", "fp32"):
        return "stored only"
    return "native" if weight_format.partition("_")[0] == compute else "expanded"


def tables() -> str:
    """All tables of the page, as Markdown."""
    parts = [MARK]
    for backend in sorted(
        {record.name for record in (BACKENDS[module] for module in BACKENDS)}, reverse=True
    ):
        auto = "what `auto` takes" if backend in AUTOMATIC else "by name only"
        parts.append(f'\n## `backend="{backend}"` ({auto})\n\n{_matrix(backend)}')
    return "".join(parts) + f"\n## Why, where it is refused\n\n{_refusals()}\n## Sizes\n\n{_sizes()}"


def _matrix(backend: str) -> str:
    """One row for the formats that have the same cells."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for weight_format in FORMATS:
        rows.setdefault(tuple(cell(kind, weight_format, backend) for kind in KINDS), []).append(weight_format)
    lines = [("weights", *(kind.name for kind in KINDS)), ("---",) * (len(KINDS) + 1)]
    lines += [(", ".join(f"`{name}`" for name in names), *cells) for cells, names in rows.items()]
    return _table(lines)


ASKED = (  # for which weights, in which products
    *((backend, "fp8", "bf16") for backend in AUTOMATIC),
    *(("te", name, name) for name in ("fp8", "mxfp8", "nvfp4", "fp8_e5m2")),
)


def _refusals() -> str:
    """What the backends themselves say."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        with standing_on(kind):
            for backend, weight_format, compute in ASKED:
                reason = backend_named(backend).refuses(weight_format, compute, kind.device, SHAPE)
                if reason is not None:
                    found.setdefault(f"{backend}: {reason}.", []).append(kind.name)
    return _table(
        [
            ("device", "what it says"),
            ("---", "---"),
            *((", ".join(dict.fromkeys(kinds)), said) for said, kinds in found.items()),
        ]
    )


def _sizes() -> str:
    lines: list[tuple[str, ...]] = [("products", "out a multiple of", "in a multiple of"), ("---",) * 3]
    lines += [(name, str(out), str(inp)) for name, (out, inp) in torch_native.ALIGNMENT.items()]
    return _table(lines)


def _table(lines: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + tables())
