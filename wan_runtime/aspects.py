"""Two checkpoints aspect by aspect, in words: the rows of `compare`, and the words of its findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wan_runtime.anatomy import Anatomy, Parts
from wan_runtime.header import Entry

Row = tuple[str, str, str, str]  # aspect, in a, in b, what the difference does
DIGITS = {
    "F32": "7.2",
    "F16": "3.3",
    "BF16": "2.4",
    "F8_E4M3": "1.2",
    "F8_E5M2": "0.9",
}  # decimal, of a mantissa


def aspects(a: Anatomy, b: Anatomy, layer: str) -> tuple[Row, ...]:
    """The two files aspect by aspect; the last column is empty where they agree."""
    return tuple(
        (name, left, right, impact if left != right else "")
        for name, left, right, impact in _all(a, b, layer)
    )


def _all(a: Anatomy, b: Anatomy, layer: str) -> Iterator[Row]:
    first, second = a.layers[layer], b.layers[layer]
    yield "Written by", _who(a), _who(b), "each producer has its own key names, layout and order of codes"
    yield "Producer's marks", _listed(a.markers), _listed(b.markers), "without marks a host has to guess"
    yield "Module names", spelled(a), spelled(b), "keys are not found"
    yield "Model", a.variant or "?", b.variant or "?", "different models"
    yield "Weight name", f".{first.payload}", f".{second.payload}", "the weight is not found"
    yield "Weight dtype", first.weight.dtype, second.weight.dtype, _weight_impact(second)
    yield "Weight shape", shape(first.weight), shape(second.weight), "codes are packed, not one a byte"
    yield from _scale_rows(first, second)
    for name, left, right in (
        ("Bias dtype", a.biases, b.biases),
        ("Norm dtype", a.norms, b.norms),
        ("Modulation dtype", a.modulation, b.modulation),
    ):
        yield name, counts(left), counts(right), precision(left, right)
    yield "Input scale", _inputs(a), _inputs(b), "static activation scales need one; dynamic ones do not"
    yield "Dequantisation", _formulas(a), _formulas(b), "the weights are computed otherwise"
    yield "Layers quantised", _share(a), _share(b), "another choice of layers"
    yield "Tensors", f"{a.tensors:,}", f"{b.tensors:,}", f"{b.tensors - a.tensors:+,}"
    sizes = _bytes(first), _bytes(second)
    yield f"Bytes of {layer}", f"{sizes[0]:,}", f"{sizes[1]:,}", _saving(*sizes)
    yield "File size", f"{a.bytes:,}", f"{b.bytes:,}", _saving(a.bytes, b.bytes)


def _scale_rows(first: Parts, second: Parts) -> Iterator[Row]:
    both = (first, second)
    names = [leaves(part.scales) for part in both]
    yield "Scale names", names[0], names[1], "a scale that is not found is left out: noise"
    many = [str(len(part.scales)) for part in both]
    yield "Scales a layer", many[0], many[1], "another hierarchy of scales"
    shapes = [", ".join(shape(part.entries[leaf]) for leaf in part.scales) or "-" for part in both]
    yield "Scale shapes", shapes[0], shapes[1], "one scale a tensor, an output channel or a block of weights"
    dtypes = [", ".join(part.entries[leaf].dtype for leaf in part.scales) or "-" for part in both]
    impact = "the scales are themselves quantised" if "F8_E" in dtypes[1] else "read as fp32"
    yield "Scale dtypes", dtypes[0], dtypes[1], impact


def _weight_impact(second: Parts) -> str:
    return "packed codes need unpacking" if second.packed else "another number format"


def precision(a: Mapping[str, int], b: Mapping[str, int]) -> str:
    """What B's lowest precision keeps of A's."""
    if not a or not b:
        return ""
    best, worst = min(a, key=lambda d: float(DIGITS.get(d, 9))), min(b, key=lambda d: float(DIGITS.get(d, 9)))
    return f"{DIGITS.get(worst, '?')} decimal digits instead of {DIGITS.get(best, '?')}"


def _who(side: Anatomy) -> str:
    if len(side.readings) == 1:
        return side.readings[0].dialect
    return "undecided: " + " or ".join(r.dialect for r in side.readings) if side.readings else "unknown"


def _inputs(side: Anatomy) -> str:
    if side.input_scales:
        return f"present, {side.input_scales} of {len(side.layers)}"
    return "missing" if wants_input_scale(side) else "none needed"


def wants_input_scale(side: Anatomy) -> bool:
    """Whether hosts of this file's convention multiply with static activation scales: NVFP4 under Comfy's keys."""
    return any("weight_scale_2" in parts.scales for parts in side.layers.values())


def _formulas(side: Anatomy) -> str:
    many = len(side.readings) > 1
    return " OR ".join(f"{r.formula} [{r.dialect}]" if many else r.formula for r in side.readings) or "?"


def spelled(side: Anatomy) -> str:
    """How a file names modules."""
    return side.names + (f", prefix {side.prefix!r}" if side.prefix else "")


def _share(side: Anatomy) -> str:
    return f"{side.quantised} of {len(side.layers)} block Linears"


def shape(entry: Entry) -> str:
    """A tensor's shape as the tables show it."""
    return str(list(entry.shape))


def leaves(names: tuple[str, ...] | list[str]) -> str:
    """Key endings as the tables show them."""
    return ", ".join(f".{name}" for name in names) or "none"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def counts(dtypes: Mapping[str, int]) -> str:
    """How many tensors of each dtype."""
    return ", ".join(f"{dtype} x {count}" for dtype, count in dtypes.items()) or "none"


def _bytes(parts: Parts) -> int:
    """Of one layer without its bias: codes and scales."""
    return sum(entry.nbytes for leaf, entry in parts.entries.items() if leaf != "bias")


def _saving(a: int, b: int) -> str:
    return f"B is {abs(1 - b / a):.0%} {'smaller' if b < a else 'larger'}" if a else ""
