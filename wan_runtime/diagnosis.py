"""What a host made for one checkpoint gets wrong with another: each root cause with what to do about it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wan_runtime.anatomy import Anatomy, Reading
from wan_runtime.aspects import counts, leaves, precision, shape, spelled, wants_input_scale
from wan_runtime.converting import targets

FLOAT8 = ("F8_E4M3", "F8_E5M2")
CASTS = ("plain_fp8",)  # their hosts read scaled FP8 too
ORIGINAL = "Only the bf16 original has them in full: convert that, which writes norms, biases and modulation in fp32."


@dataclass(frozen=True)
class Finding:
    """One root cause, and what to do about it."""

    cause: str
    remedy: str


def findings(a: Anatomy, b: Anatomy, layer: str) -> tuple[Finding, ...]:
    """What a host made for `a` would get wrong with `b`, the fatal first."""
    return (*_identity(a, b), *_weight(a, b, layer), *_scales(a, b, layer), *_order(a, b), *_losses(a, b))


def _identity(a: Anatomy, b: Anatomy) -> Iterator[Finding]:
    if a.variant and b.variant and a.variant != b.variant:
        yield Finding(
            f"They are different models: A is {a.variant}, B is {b.variant}.",
            f"Take a checkpoint of {a.variant} for that host; `wan-runtime inspect` says of which model a file is.",
        )
    if (a.names, a.prefix) != (b.names, b.prefix):
        yield Finding(
            f"It would find none of its keys: A's modules are named as in {spelled(a)}, B's as in {spelled(b)}.",
            f"Convert B with --names {a.names}; a prefix is dropped. wan_runtime.patch reads both spellings.",
        )
    if len(b.readings) > 1:
        choice = "; ".join(f"{reading.dialect}: {reading.meaning}" for reading in b.readings)
        yield Finding(
            f"Nothing in B says who wrote it, and {len(b.readings)} readings fit ({choice}). The wrong one gives noise "
            "of the right mean and spread, which no check of values can see.",
            "Name its producer with --dialect, or give the bf16 file it was made from with --reference.",
        )
    if not b.readings:
        yield Finding(
            f"B cannot be read with certainty: {b.evidence}",
            "Name the tool that wrote B with --dialect, or convert the bf16 original instead.",
        )


def _weight(a: Anatomy, b: Anatomy, layer: str) -> Iterator[Finding]:
    first, second = a.layers[layer], b.layers[layer]
    if first.payload != second.payload:
        yield Finding(
            f"It would look for {layer}.{first.payload} and not find it: B's is called .{second.payload}. A loader "
            "that does not insist leaves the layer as it was initialised: noise.",
            _fix(a, ", which gives every tensor the name that A's host looks for"),
        )
    if second.packed and not first.packed:
        halved = second.shape is not None and second.shape[-1] == 2 * second.weight.shape[-1]
        codes = "two 4-bit codes a byte" if halved else "several codes to an element"
        yield Finding(
            f"It would take B's packed codes for weights: {layer}.{second.payload} is {second.weight.dtype} "
            f"{shape(second.weight)}, {codes}, where A has {first.weight.dtype} {shape(first.weight)}.",
            _fix(a, ": unpacked, one number an element"),
        )


def _scales(a: Anatomy, b: Anatomy, layer: str) -> Iterator[Finding]:
    first, second = a.layers[layer], b.layers[layer]
    wanted, given = first.scales, second.scales
    lost, extra = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    if lost and given:
        yield Finding(
            f"It would look for {layer}.{lost[0]} and not find it: B's scales are called {leaves(given)}. A loader "
            "that does not insist takes the codes for weights, without their scale: noise.",
            _fix(a, f", which writes .{lost[0]}"),
        )
    if extra:
        count = sum(b.scales[name] for name in extra)
        yield Finding(
            f"It would leave {count} scale tensors of B unread ({leaves(extra)}).",
            "Load B strictly, so that unread tensors are an error; wan_runtime.patch uses every one or names it.",
        )
    if second.weight.dtype in FLOAT8 and not given and wanted:
        yield Finding(
            "B's weights were cast to FP8 without scales: it would look for scales that do not exist.",
            "Convert the bf16 original for that host; wan_runtime.patch reads B as it is, with a scale of 1.",
        )
    if "comfy_quant" in first.entries and "comfy_quant" not in second.entries:
        yield Finding(
            "It would load B's layers as they lie there: none has a comfy_quant record, so no scale is applied.",
            _fix(a, ", which writes a record a layer"),
        )
    marked = "tensor scaled_fp8" in a.markers, "tensor scaled_fp8" in b.markers
    if marked == (True, False) and not extra:
        yield Finding(
            "It would not know that B's FP8 weights are scaled: the file's scaled_fp8 marker is missing.",
            "Convert B with --to comfy-fp8-scaled, which writes the marker and carries codes and scales over exactly.",
        )


def _order(a: Anatomy, b: Anatomy) -> Iterator[Finding]:
    first, second = a.decided, b.decided
    if not (first and second) or first.format is None or first.format != second.format:
        return
    differ = [
        name for name in first.layout if first.layout[name] != second.layout.get(name, first.layout[name])
    ]
    if differ:
        said = ", ".join(f"{name}: A {first.layout[name]}, B {second.layout[name]}" for name in differ)
        yield Finding(
            f"It would read B's codes and block scales in the wrong order ({said}): noise of the right spread.",
            _fix(a, ": the same codes and scales, bit for bit, in A's order"),
        )


def _losses(a: Anatomy, b: Anatomy) -> Iterator[Finding]:
    for role, first, second in (
        ("Biases", a.biases, b.biases),
        ("Norms", a.norms, b.norms),
        ("Modulation tensors", a.modulation, b.modulation),
    ):
        if set(first) == {"F32"} and second and set(second) != {"F32"}:
            yield Finding(
                f"{role} lost precision: A stores {counts(first)}, B {counts(second)}; {precision(first, second)}.",
                ORIGINAL,
            )
    calibrate = "For a host that needs them: `wan-runtime convert ... --calibrate PROMPTS.TXT` records and writes them."
    if b.quantised and not b.input_scales and a.input_scales:
        yield Finding(
            "B has no input_scale: a host with static activation scales has none to use, or takes 1.0.",
            calibrate,
        )
    elif not b.input_scales and wants_input_scale(b):
        yield Finding(
            "B has no input_scale, which a host that multiplies NVFP4 with static activation scales needs; wan-runtime "
            "quantises activations a token at a time and does not.",
            calibrate,
        )


def remedies(a: Anatomy, b: Anatomy, settled: str | None = None) -> tuple[str, ...]:
    """What to do, each command on a line of its own. `settled` is the reading of `b` that its weights decided for."""
    if not b.readings:
        return ("Name the tool that wrote B with --dialect, or convert the bf16 original instead.",)
    if _alike(a, b):
        return ("Nothing to convert: B is in A's dialect, format and spelling.",)
    wanted = _target(a.decided)
    undecided = len(b.readings) > 1 and settled is None
    advice = [_settling(a, b, settled)] if len(b.readings) > 1 else []
    named = f", dialect={settled!r}" if settled else ", dialect=..." if undecided else ""
    advice.append(f"Run B as it is, its dialect understood: wan_runtime.patch(model, {b.path!r}{named}).")
    if wanted is None:
        return tuple(advice)
    made = shlex.quote(str(Path(b.path).with_name(f"{Path(b.path).stem}-{wanted}.safetensors")))
    flag = f" --dialect {settled}" if settled else " --reference BF16_ORIGINAL" if undecided else ""
    command = f"wan-runtime convert {shlex.quote(b.path)} {made} --to {wanted} --names {a.names}{flag}"
    advice.append(f"{_purpose(a)}:\n{command}")
    if b.quantised and targets()[wanted][1] not in (*(reading.format for reading in b.readings), "bf16"):
        advice.append(
            "That quantises a second time, on top of B's own error: convert the bf16 original where you have it."
        )
    if any(set(dtypes) - {"F32"} for dtypes in (b.biases, b.norms, b.modulation)):
        advice.append("What B rounded stays rounded: only the original has those norms and biases in full.")
    return tuple(advice)


def _alike(a: Anatomy, b: Anatomy) -> bool:
    first, second = a.decided, b.decided
    if first is None or second is None or (a.names, a.prefix) != (b.names, b.prefix):
        return False
    return (first.dialect, first.format) == (second.dialect, second.format)


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
    written = targets()
    if reading.format is None:
        return "bf16"
    same = [name for name, (dialect, _) in written.items() if dialect.name == reading.dialect]
    exact = [name for name in same if written[name][1] == reading.format]
    near = "comfy-fp8-scaled" if reading.dialect in CASTS else "bf16"
    return next(iter((*exact, *same)), near)


def _purpose(a: Anatomy) -> str:
    """What the converted file is for."""
    if _unwritten(a):
        return f"{_unwritten(a)} Make a bf16 file and quantise that with the tool that A's host uses"
    return "Make a file that A's host reads"


def _unwritten(a: Anatomy) -> str:
    """That `convert` writes nothing which A's host is sure to read, or ""."""
    reading = a.decided
    if reading is None or reading.format is None or _target(reading) != "bf16":
        return ""
    return f"Files of {reading.dialect} are read and not written."


def _fix(a: Anatomy, gain: str) -> str:
    """The option of `convert` that makes a file for A's host, and what is gained."""
    if _unwritten(a):
        return f"{_unwritten(a)} Convert B with --to bf16 and quantise that with the tool that A's host uses."
    target = _target(a.decided)
    if target is None:  # nothing says what A is, so neither what its host reads
        return "Convert B to what that host reads: `wan-runtime convert --help` lists the targets."
    return f"Convert B with --to {target}{gain}."
