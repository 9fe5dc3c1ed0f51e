"""`convert`: one checkpoint into another dialect, format or spelling, in memory bounded by a few layers.

Decided first, for every weight, from the header alone (wan_runtime.transcoding); then executed in the file's own order,
several layers at a time where memory allows. Where source and target hold the same format the codes and scales are
carried over bit for bit (only nibbles, block-scale layout and key names change); elsewhere weights are dequantised in
fp32 and quantised again, and the report says what that cost each layer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from wan_runtime.arranging import arranged
from wan_runtime.backends import device_named
from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.conversion import ConversionReport
from wan_runtime.dialects import DIALECTS, OWN_MARKER, Dialect
from wan_runtime.errors import InvalidOption, NothingToPatch, UnknownName
from wan_runtime.making import Making, made
from wan_runtime.names import SPELLINGS
from wan_runtime.progress import watched
from wan_runtime.quantising import SCALES, SEARCHED
from wan_runtime.transcoding import (
    ANEW,
    QUANTISING,
    REST,
    Step,
    Target,
    decide,
    holds_input_scales,
    matches,
    slots_of,
)
from wan_runtime.version import VERSION
from wan_runtime.writing import check_place, new_safetensors, spec_of

MOST_THREADS = 4


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    names: str = "keep",
    *,
    dialect: str | None = None,
    reference: Path | str | None = None,
    device: torch.device | str | None = None,
    keep: str | Sequence[str] = (),
    scale: str = "amax",
    per_channel: bool = False,
    rest_dtype: str = "auto",
    activations: Mapping[str, float] | Callable[[], Mapping[str, float]] | None = None,
    threads: int | None = None,
) -> ConversionReport:
    """Write a WAN checkpoint in another dialect, format or spelling.

    Args:
        src: the checkpoint to read, of any dialect that `inspect` knows: a .safetensors file, the folder or index of
            one in several files, or a .pth file, out of which only tensors are taken.
        dst: the .safetensors file to write. An older one is replaced, and only once the new one is complete.
        to: bf16, or a producer's dialect and format, such as comfy-fp8-scaled or modelopt-nvfp4.
        names: "original", "diffusers", or "keep" for the source's own; a prefix is dropped.
        dialect, reference: settle what `src` is, as for `patch`.
        device: where to quantise; None is the GPU when there is one.
        keep: pattern(s) of module paths (either spelling, `*` as in a shell) to leave unquantised.
        scale: "amax", or "mse" to search for the scales with the least squared error (FP8: a scale a tensor or channel;
            NVFP4: every block's).
        per_channel: FP8 with one scale an output channel, for the targets that can hold it.
        rest_dtype: of what is not quantised: "auto" (norms, biases and modulation fp32, other weights as the source has
            them), "keep" (all as the source has them), "fp32", "bf16" or "fp16".
        activations: original module path -> the largest magnitude of the layer's input, as `calibrate` records it, or
            a function that records them, called when everything else is known to be right; the file then gets static
            input scales, amax / 448 (FP8) or amax / 2688 (NVFP4).
        threads: layers to work on at a time, as far as memory allows; None is the number of cores, at most 4.

    From an unquantised file, the Linears of the blocks are quantised. A quantised file's own choice of layers is kept,
    except that embeddings and the head are not quantised anew. With to="bf16" the blocks' weights are written in bf16
    and everything else, with rest_dtype="auto", in fp32.

    Returns a ConversionReport. Raises CheckpointError and its subclasses for what cannot be read right, InvalidOption
    for what cannot be written, NothingToPatch when no layer would be quantised; nothing is then left half-written.
    """
    began = time.monotonic()
    making = Making(device_named(device), scale, None, _threads(threads))
    patterns = (keep,) if isinstance(keep, str) else tuple(keep)
    target = _target(to, names, patterns, per_channel, rest_dtype, activations is not None)
    source = open_checkpoint(src, dialect=dialect, reference=reference, pickle=True)
    if names == "keep":
        target = dataclasses.replace(target, spelling=source.spelling)
    source = arranged(source, target.spelling)
    _check_keep(source, target)
    steps = decide(source, target)
    _refuse_nothing(steps, target)
    _check_scale(scale, steps, target)
    check_place(Path(dst), source.header.files)
    if activations is not None:
        making = dataclasses.replace(making, activations=_recorded(activations, steps))
    errors = _execute(source, Path(dst), target, steps, making)
    return _report(source, Path(dst), target, steps, errors, time.monotonic() - began)


def targets() -> dict[str, tuple[Dialect, str]]:
    """Every name that `to` accepts -> the dialect and format it writes."""
    return {
        name: (record, held)
        for record in (DIALECTS[d] for d in DIALECTS)
        for name, held in record.targets.items()
    }


def _target(
    to: str, names: str, keep: tuple[str, ...], per_channel: bool, rest: str, calibrated: bool
) -> Target:
    known = targets()
    if to not in known:
        raise UnknownName("conversion target", to, sorted(known))
    if names not in ("keep", *SPELLINGS):
        raise UnknownName("spelling", names, ("keep", *SPELLINGS))
    if rest not in ("auto", "keep", *REST):
        raise UnknownName("rest_dtype", rest, ("auto", "keep", *REST))
    dialect, held = known[to]
    able = [name for name, (record, _) in known.items() if name in record.per_channel]
    if per_channel and to not in able:
        raise InvalidOption(
            f"per_channel: {to} holds one scale a tensor. One scale an output channel is for {', '.join(able)}."
        )
    wide = per_channel or dialect.per_channel.get(to) == "always"
    spelling = SPELLINGS["original" if names == "keep" else names]
    target = Target(to, dialect, None if held == "bf16" else held, spelling, keep, wide, rest, calibrated)
    if calibrated and not holds_input_scales(target):
        raise InvalidOption(
            f"{to} has no place for calibrated input scales: its activations are quantised as they come. Leave the "
            "calibration out."
        )
    return target


def _threads(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise InvalidOption(f"threads={asked}: at least one is needed.")
    return asked or min(os.cpu_count() or 1, MOST_THREADS)


def _check_keep(source: Checkpoint, target: Target) -> None:
    modules = [*source.layers, *(p.removesuffix(".weight") for p in source.plain if p.endswith(".weight"))]
    for pattern in target.keep:
        if not any(matches(pattern, module) for module in modules):
            raise InvalidOption(
                f"keep={pattern!r} matches no module of {source.path}. Paths look like {modules[0]!r}; "
                "`*` stands for any characters."
            )


def _refuse_nothing(steps: Mapping[str, Step], target: Target) -> None:
    if target.format is not None and not any(s.action in QUANTISING for s in steps.values()):
        raise NothingToPatch(
            f"no layer would be held in {target.format}: "
            + "; ".join(sorted({s.reason for s in steps.values()}))
            + ". Check keep=, or use to='bf16'."
        )


def _check_scale(scale: str, steps: Mapping[str, Step], target: Target) -> None:
    """Refuse a search that would do nothing."""
    if scale not in SCALES:
        raise UnknownName("scale", scale, SCALES)
    if scale == "mse" and target.format not in SEARCHED:
        raise InvalidOption(
            f"scale='mse' searches the scales of {', '.join(SEARCHED)}; {target.name} has none to search."
        )
    if scale == "mse" and not any(step.action in ANEW for step in steps.values()):
        raise InvalidOption(
            "scale='mse' searches the scales of layers that are quantised, and here every layer's codes and scales are "
            "carried over as they are. Leave it out, or convert from the bf16 original."
        )


def _recorded(
    activations: Mapping[str, float] | Callable[[], Mapping[str, float]], steps: Mapping[str, Step]
) -> Mapping[str, float]:
    """The amax of every layer that is to get an input scale, and no layer without one."""
    amax = activations() if callable(activations) else activations
    wanted = [step.module for step in steps.values() if step.input_scale == "calibrated"]
    missing = [module for module in wanted if not 0 < amax.get(module, 0.0) < float("inf")]
    if missing:
        raise InvalidOption(
            f"the calibration has no amax for {len(missing)} of {len(wanted)} layers, the first {missing[0]!r}: no "
            "prompt reached them, or it was made for another model. A made-up scale would clip or drown the signal."
        )
    return amax


def _execute(
    source: Checkpoint, dst: Path, target: Target, steps: Mapping[str, Step], making: Making
) -> dict[str, float]:
    """Write the new file; returns the relative L2 error that each newly quantised layer got."""
    held = {s.module: str(target.format) for s in steps.values() if s.action in QUANTISING}
    marks = target.dialect.marks(held)
    specs = {key: spec for step in steps.values() for key, spec in step.specs.items()}
    specs |= {key: spec_of(tensor) for key, tensor in marks.tensors.items()}
    metadata = {"format": "pt", OWN_MARKER: _marker(source, target, marks.layout), **marks.metadata}
    errors: dict[str, float] = {}
    with new_safetensors(dst, specs, metadata, sources=source.header.files) as write:
        for key, tensor in marks.tensors.items():
            write(key, tensor)
        for new in watched(made(source, steps, target, making), source, "converting"):
            for key, tensor in new.tensors.items():
                write(key, tensor)
            if new.error is not None:
                errors[steps[new.path].module] = new.error
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
        bytes_before=source.header.nbytes,
        bytes_after=dst.stat().st_size,
        seconds=seconds,
        notes=_notes(source, target, steps),
    )


def _notes(source: Checkpoint, target: Target, steps: Mapping[str, Step]) -> tuple[str, ...]:
    notes = [f"{note}." for note in source.header.notes]
    already = all(step.action in ("exact", "kept") for step in steps.values())
    if source.layers and already and source.dialect is target.dialect:
        notes.append(
            f"The source is {target.name} already: every layer's codes and scales are its own, and only names, the "
            "dtype of what is not quantised and the header's marks can differ."
        )
    twice = sum(step.action == "requantised" for step in steps.values())
    if twice:
        notes.append(
            f"{twice} layers were quantised a second time: the error above comes on top of the source's own. Convert "
            "from the bf16 original where you have it."
        )
    dropped = sum(
        "input_scale" in slots_of(layer) and steps[path].input_scale is None
        for path, layer in source.layers.items()
    )
    if dropped:
        notes.append(
            f"{dropped} static input scales were left out: they were calibrated for another format. Activations are "
            "quantised a token at a time without them."
        )
    return tuple(notes)
