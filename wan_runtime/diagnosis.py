"""What the differences between two checkpoints do: aspect by aspect, in a host made for the first, and what helps."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from wan_runtime.anatomy import Anatomy, Reading
from wan_runtime.converting import targets
from wan_runtime.header import Entry

Row = tuple[str, str, str, str]  # aspect, in a, in b, what the difference does
DIGITS = {
    "F32": "7.2",
    "F16": "3.3",
    "BF16": "2.4",
    "F8_E4M3": "1.2",
    "F8_E5M2": "0.9",
}  # decimal, of a mantissa
FLOAT8 = ("F8_E4M3", "F8_E5M2")


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
    yield "Module names", _spelled(a), _spelled(b), "keys are not found"
    yield "Model", a.variant or "?", b.variant or "?", "different models"
    yield "Weight dtype", first["weight"].dtype, second["weight"].dtype, _weight_impact(b, layer)
    yield "Weight shape", _shape(first["weight"]), _shape(second["weight"]), "two weights lie in one byte"
    yield from _scale_rows(a, b, layer)
    yield "Bias dtype", _counts(a.biases), _counts(b.biases), _precision(a.biases, b.biases)
    yield "Norm dtype", _counts(a.norms), _counts(b.norms), _precision(a.norms, b.norms)
    yield (
        "Modulation dtype",
        _counts(a.modulation),
        _counts(b.modulation),
        _precision(a.modulation, b.modulation),
    )
    yield "Input scale", _inputs(a), _inputs(b), "static activation scales need one; dynamic ones do not"
    yield "Dequantisation", _formulas(a), _formulas(b), "the weights are computed otherwise"
    yield "Layers quantised", _share(a), _share(b), "another choice of layers"
    yield "Tensors", f"{a.tensors:,}", f"{b.tensors:,}", f"{b.tensors - a.tensors:+,}"
    yield (
        f"Bytes of {layer}",
        f"{_bytes(first):,}",
        f"{_bytes(second):,}",
        _saving(_bytes(first), _bytes(second)),
    )
    yield "File size", f"{a.bytes:,}", f"{b.bytes:,}", _saving(a.bytes, b.bytes)


def _scale_rows(a: Anatomy, b: Anatomy, layer: str) -> Iterator[Row]:
    first, second = a.layers[layer], b.layers[layer]
    names = a.scale_names(layer), b.scale_names(layer)
    yield "Scale names", _leaves(names[0]), _leaves(names[1]), "a scale that is not found is left out: noise"
    yield "Scales a layer", str(len(names[0])), str(len(names[1])), "another hierarchy of scales"
    shapes = [
        ", ".join(_shape(part[n]) for n in own) or "-"
        for part, own in zip((first, second), names, strict=True)
    ]
    yield (
        "Scale shapes",
        shapes[0],
        shapes[1],
        "one scale a tensor, an output channel or a block of weights",
    )
    dtypes = [
        ", ".join(part[n].dtype for n in own) or "-" for part, own in zip((first, second), names, strict=True)
    ]
    impact = "the scales are themselves quantised" if "F8_E4M3" in dtypes[1] else "read as fp32"
    yield "Scale dtypes", dtypes[0], dtypes[1], impact


def causes(a: Anatomy, b: Anatomy, layer: str) -> tuple[str, ...]:
    """What a host made for `a` would get wrong with `b`, the fatal first."""
    return (*_identity_causes(a, b), *_scale_causes(a, b, layer), *_order_causes(a, b), *_loss_causes(a, b))


def _identity_causes(a: Anatomy, b: Anatomy) -> Iterator[str]:
    if a.variant and b.variant and a.variant != b.variant:
        yield f"They are different models: A is {a.variant}, B is {b.variant}."
    if (a.names, a.prefix) != (b.names, b.prefix):
        yield f"It would find none of its keys: A's modules are named as in {_spelled(a)}, B's as in {_spelled(b)}."
    if len(b.readings) > 1:
        choice = "; ".join(f"{reading.dialect}: {reading.meaning}" for reading in b.readings)
        yield (
            f"Nothing in B says who wrote it, and {len(b.readings)} readings fit ({choice}). The wrong one gives noise "
            "of the right mean and spread, which no check of values can see."
        )
    if not b.readings:
        yield f"B cannot be read with certainty: {b.evidence}"


def _scale_causes(a: Anatomy, b: Anatomy, layer: str) -> Iterator[str]:
    wanted, given = a.scale_names(layer), b.scale_names(layer)
    lost, extra = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    first, second = a.layers[layer]["weight"], b.layers[layer]["weight"]
    if lost and given:
        yield (
            f"It would look for {layer}.{lost[0]} and not find it: B's scales are called {_leaves(given)}. A loader "
            "that does not insist takes the codes for weights, without their scale: noise."
        )
    if extra:
        count = sum(b.scales[name] for name in extra)
        yield f"It would leave {count} scale tensors of B unread ({_leaves(extra)})."
    if second.dtype == "U8" and first.dtype != "U8":
        yield (
            f"It would take B's packed codes for weights: {layer}.weight is U8 {_shape(second)}, two 4-bit codes a "
            f"byte, where A has {first.dtype} {_shape(first)}."
        )
    if second.dtype in FLOAT8 and not given and wanted:
        yield "B's weights were cast to FP8 without scales: it would look for scales that do not exist."
    if "comfy_quant" in a.layers[layer] and "comfy_quant" not in b.layers[layer]:
        yield "It would load B's layers as they lie there: none has a comfy_quant record, so no scale is applied."
    marked = "tensor scaled_fp8" in a.markers, "tensor scaled_fp8" in b.markers
    if marked == (True, False) and not extra:
        yield "It would not know that B's FP8 weights are scaled: the file's scaled_fp8 marker is missing."


def _order_causes(a: Anatomy, b: Anatomy) -> Iterator[str]:
    first, second = a.decided, b.decided
    if first and second and first.format == second.format == "nvfp4" and first.layout != second.layout:
        differ = ", ".join(
            f"{name}: A {first.layout[name]}, B {second.layout[name]}" for name in first.layout
        )
        yield f"It would read B's codes and block scales in the wrong order ({differ}): noise of the right spread."


def _loss_causes(a: Anatomy, b: Anatomy) -> Iterator[str]:
    for role, first, second in (
        ("Biases", a.biases, b.biases),
        ("Norms", a.norms, b.norms),
        ("Modulation tensors", a.modulation, b.modulation),
    ):
        if set(first) == {"F32"} and second and set(second) != {"F32"}:
            yield f"{role} lost precision: A stores {_counts(first)}, B {_counts(second)}; {_precision(first, second)}."
    if b.quantised and not b.input_scales and a.input_scales:
        yield "B has no input_scale: a host with static activation scales has none to use, or takes 1.0."
    elif b.layers and not b.input_scales and any("weight_scale_2" in parts for parts in b.layers.values()):
        yield (
            "B has no input_scale, which a host that multiplies NVFP4 with static activation scales needs; wan-runtime "
            "quantises activations a token at a time and does not."
        )


def remedies(a: Anatomy, b: Anatomy, settled: str | None = None) -> tuple[str, ...]:
    """What to do, each command on a line of its own. `settled` is the reading of `b` that its weights decided for."""
    if not b.readings:
        return ("Name the tool that wrote B with --dialect, or convert the bf16 original instead.",)
    wanted, held = _target(a.decided), _target(b.decided)
    if wanted == held is not None and (a.names, a.prefix) == (b.names, b.prefix):
        return ("Nothing to convert: B is in A's dialect, format and spelling.",)
    undecided = len(b.readings) > 1 and settled is None
    advice = [_settling(a, b, settled)] if len(b.readings) > 1 else []
    named = f", dialect={settled!r}" if settled else ", dialect=..." if undecided else ""
    advice.append(f"Run B as it is, its dialect understood: wan_runtime.patch(model, {b.path!r}{named}).")
    if wanted is None:
        return tuple(advice)
    made = shlex.quote(str(Path(b.path).with_name(f"{Path(b.path).stem}-{wanted}.safetensors")))
    flag = f" --dialect {settled}" if settled else " --reference BF16_ORIGINAL" if undecided else ""
    command = f"wan-runtime convert {shlex.quote(b.path)} {made} --to {wanted} --names {a.names}{flag}"
    advice.append(f"Make a file that A's host reads:\n{command}")
    if b.quantised and targets()[wanted][1] not in (*(reading.format for reading in b.readings), "bf16"):
        advice.append(
            "That quantises a second time, on top of B's own error: convert the bf16 original where you have it."
        )
    if _rounded(b):
        advice.append("What B rounded stays rounded: only the original has those norms and biases in full.")
    return tuple(advice)


def _settling(a: Anatomy, b: Anatomy, settled: str | None) -> str:
    if settled is not None:
        return f"B's weights are A's when read as {settled}: name that dialect wherever B is used."
    known = shlex.quote(a.path) if a.decided and a.variant == b.variant else "BF16_ORIGINAL"
    return (
        "Settle who wrote B by its weights: where both come from one original, the right reading is near 0.1 and a "
        f"wrong one above 0.4.\nwan-runtime compare {known} {shlex.quote(b.path)} --errors"
    )


def _target(reading: Reading | None) -> str | None:
    """The name that `convert` knows for a reading's dialect and format, or the nearest that can be written."""
    if reading is None:
        return None
    for name, (dialect, held) in targets().items():
        if dialect.name == reading.dialect and held == (reading.format or "bf16"):
            return name
    return "comfy-fp8-scaled"  # fp8 without scales, and e5m2, are read and not written


def _rounded(b: Anatomy) -> bool:
    return any(set(counts) - {"F32"} for counts in (b.biases, b.norms, b.modulation))


def _weight_impact(b: Anatomy, layer: str) -> str:
    return (
        "packed codes need unpacking" if b.layers[layer]["weight"].dtype == "U8" else "another number format"
    )


def _precision(a: Mapping[str, int], b: Mapping[str, int]) -> str:
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
    return "missing" if any("weight_scale_2" in parts for parts in side.layers.values()) else "none needed"


def _formulas(side: Anatomy) -> str:
    return (
        " OR ".join(
            f"{r.formula} [{r.dialect}]" if len(side.readings) > 1 else r.formula for r in side.readings
        )
        or "?"
    )


def _spelled(side: Anatomy) -> str:
    return side.names + (f", prefix {side.prefix!r}" if side.prefix else "")


def _share(side: Anatomy) -> str:
    return f"{side.quantised} of {len(side.layers)} block Linears"


def _shape(entry: Entry) -> str:
    return str(list(entry.shape))


def _leaves(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f".{name}" for name in names) or "none"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{dtype} x {count}" for dtype, count in counts.items()) or "none"


def _bytes(parts: Mapping[str, Entry]) -> int:
    """Of one layer without its bias: codes and scales."""
    return sum(entry.nbytes for leaf, entry in parts.items() if leaf != "bias")


def _saving(a: int, b: int) -> str:
    return f"B is {abs(1 - b / a):.0%} {'smaller' if b < a else 'larger'}" if a else ""
