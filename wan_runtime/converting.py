"""`convert`: one checkpoint into another dialect, format or spelling, a layer at a time.

Decided first, for every weight, from the header alone (wan_runtime.transcoding); then executed in the file's own order,
with one layer in memory. Where source and target hold the same format the codes and scales are carried over bit for
bit (only nibbles, block-scale layout and key names change); elsewhere weights are dequantised in fp32 and quantised
again, and the report says what that cost each layer.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from wan_runtime.backends import device_named
from wan_runtime.checkpoint import Checkpoint, Loaded, open_checkpoint, read_layer, read_plain
from wan_runtime.dialects import DIALECTS, OWN_MARKER, Dialect
from wan_runtime.errors import InvalidOption, NothingToPatch, UnknownName
from wan_runtime.formats import FORMATS
from wan_runtime.names import SPELLINGS
from wan_runtime.progress import watched
from wan_runtime.report import ConversionReport
from wan_runtime.transcoding import QUANTISING, Step, Target, decide, encoded, matches
from wan_runtime.version import VERSION
from wan_runtime.writing import new_safetensors, spec_of


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    names: str = "keep",
    *,
    dialect: str | None = None,
    reference: Path | str | None = None,
    device: torch.device | str | None = None,
    skip: Sequence[str] = (),
) -> ConversionReport:
    """Write a WAN checkpoint in another dialect, format or spelling.

    Args:
        src: the .safetensors file to read, of any dialect that `inspect` knows.
        dst: the .safetensors file to write. An older one is replaced, and only once the new one is complete.
        to: bf16, or a producer's dialect and format, such as comfy-fp8-scaled or modelopt-nvfp4.
        names: "original", "diffusers", or "keep" for the source's own; a prefix is dropped.
        dialect, reference: settle what `src` is, as for `patch`.
        device: where to quantise; None is the GPU when there is one. The result is the same on each.
        skip: patterns of module paths (either spelling, `*` as in a shell) to leave unquantised.

    From an unquantised file, the Linears of the blocks are quantised with one fp32 scale a tensor. A quantised file's
    own choice of layers is kept, except that embeddings and the head are not quantised anew. Norms, biases and
    modulation are written in fp32; with to="bf16", so is everything but the blocks' weights.

    Returns a ConversionReport. Raises CheckpointError and its subclasses for what cannot be read right, InvalidOption
    for what cannot be written, NothingToPatch when no layer would be quantised; nothing is then left half-written.
    """
    began = time.monotonic()
    run_on = device_named(device)
    target = _target(to, names, tuple(skip))
    source = open_checkpoint(src, dialect=dialect, reference=reference)
    if names == "keep":
        target = dataclasses.replace(target, spelling=source.spelling)
    _check_skip(source, target)
    steps = decide(source, target)
    _refuse_nothing(steps, target)
    errors = _execute(source, Path(dst), target, steps, run_on)
    return _report(source, Path(dst), target, steps, errors, time.monotonic() - began)


def targets() -> dict[str, tuple[Dialect, str]]:
    """Every name that `to` accepts -> the dialect and format it writes."""
    return {
        name: (record, held)
        for record in (DIALECTS[d] for d in DIALECTS)
        for name, held in record.targets.items()
    }


def _target(to: str, names: str, skip: tuple[str, ...]) -> Target:
    known = targets()
    if to not in known:
        raise UnknownName("conversion target", to, sorted(known))
    if names not in ("keep", *SPELLINGS):
        raise UnknownName("spelling", names, ("keep", *SPELLINGS))
    dialect, held = known[to]
    spelling = SPELLINGS["original" if names == "keep" else names]
    return Target(to, dialect, None if held == "bf16" else held, spelling, skip)


def _check_skip(source: Checkpoint, target: Target) -> None:
    modules = [*source.layers, *(p.removesuffix(".weight") for p in source.plain if p.endswith(".weight"))]
    for pattern in target.skip:
        if not any(matches(pattern, module) for module in modules):
            raise InvalidOption(
                f"skip={pattern!r} matches no module of {source.path}. Paths look like {modules[0]!r}; "
                "`*` stands for any characters."
            )


def _refuse_nothing(steps: Mapping[str, Step], target: Target) -> None:
    if target.format is not None and not any(s.action in QUANTISING for s in steps.values()):
        raise NothingToPatch(
            f"no layer would be held in {target.format}: "
            + "; ".join(sorted({s.reason for s in steps.values()}))
            + ". Check skip=, or use to='bf16'."
        )


def _execute(
    source: Checkpoint, dst: Path, target: Target, steps: Mapping[str, Step], device: torch.device
) -> dict[str, float]:
    """Write the new file; returns the relative L2 error that each newly quantised layer got."""
    held = {
        s.path.removesuffix(".weight"): str(target.format) for s in steps.values() if s.action in QUANTISING
    }
    marks = target.dialect.marks(held)
    specs = {key: spec for step in steps.values() for key, spec in step.specs.items()}
    specs |= {key: spec_of(tensor) for key, tensor in marks.tensors.items()}
    metadata = {"format": "pt", OWN_MARKER: _marker(source, target, marks.layout), **marks.metadata}
    errors: dict[str, float] = {}
    with new_safetensors(dst, specs, metadata, source=source.path) as write:
        for key, tensor in marks.tensors.items():
            write(key, tensor)
        for item in watched(_read(source, steps, device), source, "converting"):
            for key, tensor in _converted(item, steps[item.path], target, errors).items():
                write(key, tensor)
    return errors


def _marker(source: Checkpoint, target: Target, layout: Mapping[str, str]) -> str:
    """Our own mark in the header: with it a file is never undecidable."""
    return json.dumps(
        {
            "dialect": target.dialect.name,
            "version": VERSION,
            "source": source.path.name,
            "source_dialect": source.dialect.name,
            **layout,
        }
    )


def _read(source: Checkpoint, steps: Mapping[str, Step], device: torch.device) -> Iterator[Loaded]:
    for path in steps:
        if path in source.layers:
            slots = {name: tensor.to(device) for name, tensor in read_layer(source, path).items()}
            yield Loaded(path, source.layers[path].format, slots)
        else:
            yield Loaded(path, None, {"tensor": read_plain(source, path).to(device)})


def _converted(item: Loaded, step: Step, target: Target, errors: dict[str, float]) -> dict[str, torch.Tensor]:
    """The new file's tensors of one layer or plain tensor."""
    module = step.path.removesuffix(".weight")
    if step.action == "exact":
        return encoded(module, item.slots, target)
    weight = item.slots["tensor"] if item.format is None else FORMATS[item.format].dequantize(item.slots)
    if step.action not in QUANTISING:
        assert step.dtype is not None
        return {key: weight.to(step.dtype) for key in step.specs}
    assert target.format is not None
    weight = weight.float()
    slots = FORMATS[target.format].quantize(weight, False)
    norm = weight.norm()
    off = (FORMATS[target.format].dequantize(slots) - weight).norm()
    errors[module] = (off / norm).item() if norm > 0 else 0.0
    if step.input_scale:
        slots["input_scale"] = item.slots["input_scale"]
    return encoded(module, slots, target)


def _report(
    source: Checkpoint,
    dst: Path,
    target: Target,
    steps: Mapping[str, Step],
    errors: Mapping[str, float],
    seconds: float,
) -> ConversionReport:
    counts = Counter((step.action, step.reason) for step in steps.values())
    return ConversionReport(
        source=str(source.path),
        destination=str(dst),
        target=target.name,
        variant=source.variant.name,
        source_dialect=source.dialect.name,
        evidence=source.evidence,
        dialect=target.dialect.name,
        source_names=source.spelling.name,
        names=target.spelling.name,
        counts=tuple((action, reason, number) for (action, reason), number in counts.items()),
        errors=dict(errors),
        bytes_before=source.path.stat().st_size,
        bytes_after=dst.stat().st_size,
        seconds=seconds,
        notes=_notes(source, steps),
    )


def _notes(source: Checkpoint, steps: Mapping[str, Step]) -> tuple[str, ...]:
    notes = []
    twice = sum(step.action == "requantised" for step in steps.values())
    if twice:
        notes.append(
            f"{twice} layers were quantised a second time: the error above comes on top of the source's own. Convert "
            "from the bf16 original where you have it."
        )
    dropped = sum(
        any(s.slot == "input_scale" for s in layer.sources) and not steps[path].input_scale
        for path, layer in source.layers.items()
    )
    if dropped:
        notes.append(
            f"{dropped} static input scales were left out: they were calibrated for another format. Activations are "
            "quantised a token at a time without them."
        )
    return tuple(notes)
