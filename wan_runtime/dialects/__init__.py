"""Who wrote the file: one file a producer. A dialect turns key names, markers and layouts into canonical slots.

Two files can hold the same keys, dtypes and shapes and mean different weights (docs/formats.md, section 0), so a
dialect is chosen by evidence, never by shape alone, and a file that fits several readings is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from wan_runtime.catalogue import Catalogue
from wan_runtime.dialects import _refused
from wan_runtime.doubts import Refuse
from wan_runtime.errors import AmbiguousDialect, CheckpointError, UnknownDialect
from wan_runtime.header import Header

OWN_MARKER = "wan_runtime"  # header metadata of every file this library writes: JSON with "dialect"


@dataclass(frozen=True)
class Source:
    """One slot of a quantised layer: the key it is read from and how its tensor becomes the canonical slot.

    decode: (tensor as in the file, out_features, in_features) -> the slot's tensor; raises ValueError with the problem.
    check: refuses with ValueError values of the tensor as in the file that no writer of it means.
    """

    key: str
    slot: str
    decode: Callable[[torch.Tensor, int, int], torch.Tensor]
    check: Callable[[torch.Tensor, Refuse], None] | None = None


def _as_read(slots: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return slots


@dataclass(frozen=True)
class Layer:
    """One quantised Linear as the file holds it. `module` is spelled as in the file; `shape` is (out, in) features.

    finish: what all sources gave, by slot -> the format's canonical slots, for a producer that spreads one slot over
    several keys; raises ValueError with the problem.
    """

    module: str
    format: str
    shape: tuple[int, int]
    sources: tuple[Source, ...]
    finish: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] = _as_read


@dataclass(frozen=True)
class Reading:
    """Every key of the file, accounted for: in a layer's sources, as a plain tensor, or as a marker."""

    layers: Mapping[str, Layer]
    plain: tuple[str, ...]
    markers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Why a dialect fits a file. `sure` is a mark that only this producer writes; otherwise it is one possibility."""

    sure: bool
    because: str


@dataclass(frozen=True)
class Marks:
    """What a producer writes beside the layers: marker tensors and header metadata.

    `layout` says what keys and shapes cannot (nibble order, block-scale layout); it goes into our own marker.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dialect:
    """One producer's conventions.

    row      its number in docs/formats.md.
    meaning  its reading in a few words, shown where a file is ambiguous.
    detect   Header -> Evidence, or None when the file cannot be this dialect.
    read     Header -> Reading; raises BadTensor when a layer is incomplete.
    targets  names for `convert --to` -> the format written.
    encode   (format, canonical slots) -> key suffix -> tensor as this producer stores it.
    marks    layer path -> format, for all quantised layers -> Marks.
    per_channel  targets that hold one fp32 scale an output channel: "always", or "asked" when the user wants it. A
             target that is not named has one a tensor. `encode` sees the difference in the shape of slot "scale".
    """

    name: str
    row: str
    meaning: str
    detect: Callable[[Header], Evidence | None]
    read: Callable[[Header], Reading]
    targets: Mapping[str, str]
    encode: Callable[[str, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    marks: Callable[[Mapping[str, str]], Marks]
    per_channel: Mapping[str, Literal["always", "asked"]] = field(default_factory=dict)


DIALECTS: Catalogue[Dialect] = Catalogue("wan_runtime.dialects", Dialect)


def identify(header: Header, named: str | None = None) -> tuple[Dialect, str]:
    """Decide which dialect wrote the file, and the evidence in words.

    Raises AmbiguousDialect when several readings fit and no mark decides, UnknownDialect when none fits, and its
    subclass UnreadDialect when the tool is known and its files are not read.
    """
    if named is not None:
        return DIALECTS[named], "named by the caller"
    own = _own_marker(header)
    if own is not None:
        return own, f"the header's {OWN_MARKER!r} marker says so"
    _refused.refuse(header)
    found = {name: evidence for name in DIALECTS if (evidence := DIALECTS[name].detect(header)) is not None}
    sure = {name: evidence for name, evidence in found.items() if evidence.sure}
    candidates = sure or found
    if not candidates:
        raise UnknownDialect(header.path, describe(header), list(DIALECTS))
    if len(candidates) > 1:
        raise AmbiguousDialect(
            header.path,
            " ".join(sorted({evidence.because for evidence in candidates.values()})),
            {name: DIALECTS[name].meaning for name in candidates},
        )
    [(name, evidence)] = candidates.items()
    return DIALECTS[name], evidence.because


def describe(header: Header) -> str:
    """What a file holds, in one line: dtypes and the last components of its keys."""
    dtypes = Counter(entry.dtype for entry in header.entries.values())
    leaves = Counter(key.rpartition(".")[2] for key in header.entries)
    return (
        f"{len(header.entries)} tensors, dtypes "
        + ", ".join(f"{name} x {n}" for name, n in dtypes.most_common())
        + "; keys ending in "
        + ", ".join(f".{leaf} x {n}" for leaf, n in leaves.most_common(12))
    )


def _own_marker(header: Header) -> Dialect | None:
    text = header.metadata.get(OWN_MARKER)
    if text is None:
        return None
    try:
        return DIALECTS[json.loads(text)["dialect"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            header.path,
            f"the header's {OWN_MARKER!r} marker {text[:120]!r} is damaged or newer than this version ({error}); "
            "name the dialect with --dialect.",
        ) from error
