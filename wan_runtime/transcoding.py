"""Decides, for `convert`, what becomes of every tensor of a file: from its header alone, reading no weights.

The key, shape and dtype of every tensor to be written follow from the same decision, found by running the target
dialect's own encoder on tensors without data.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from wan_runtime import corrections, rules
from wan_runtime.checkpoint import Checkpoint
from wan_runtime.dialects import Dialect, Layer
from wan_runtime.formats import FORMATS
from wan_runtime.header import DTYPES
from wan_runtime.names import SPELLINGS, Spelling, from_original
from wan_runtime.writing import Spec, spec_of

Action = Literal["exact", "requantised", "quantised", "dequantised", "kept"]
InputScale = Literal["carried", "calibrated"]
QUANTISING = ("exact", "requantised", "quantised")
ANEW = ("requantised", "quantised")
REST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What an activation's amax is divided by to be its static scale; the other formats' scales are dynamic by definition.
ACTIVATION_TOP = {"fp8": 448.0, "nvfp4": 6 * 448.0}


@dataclass(frozen=True)
class Target:
    """What is written.

    name, dialect, format   the target of `to`; the format of bf16 is None.
    spelling                of the modules.
    keep                    patterns of modules to leave unquantised.
    per_channel             FP8 with one scale an output channel.
    rest                    dtype of what is not quantised: "auto", "keep" or one of REST.
    calibrated              input scales come from activations that were recorded.
    """

    name: str
    dialect: Dialect
    format: str | None
    spelling: Spelling
    keep: tuple[str, ...] = ()
    per_channel: bool = False
    rest: str = "auto"
    calibrated: bool = False


@dataclass(frozen=True)
class Step:
    """What becomes of one layer or plain tensor.

    exact        the source's codes and scales, bit for bit, as the target's dialect spells them.
    requantised  dequantised and quantised again: the source's error and the target's add up.
    quantised    from an unquantised source.
    dequantised  a quantised layer that the target holds unquantised, in `dtype`.
    kept         an unquantised tensor, in `dtype`.

    `specs` are the new file's tensors by key; `input_scale` says where the layer's static one comes from, if there is
    to be one.
    """

    path: str
    action: Action
    reason: str
    specs: Mapping[str, Spec]
    dtype: torch.dtype | None = None
    input_scale: InputScale | None = None

    @property
    def module(self) -> str:
        return self.path.removesuffix(".weight")


def decide(source: Checkpoint, target: Target) -> dict[str, Step]:
    """What becomes of every layer and plain tensor, in the order in which the file is read."""
    steps = {path: _layer_step(source, path, layer, target) for path, layer in source.layers.items()}
    steps |= {path: _plain_step(source, path, target) for path in source.plain}
    entries = source.header.entries
    begins = {path: entries[key].start for path, key in source.plain.items()}
    begins |= {path: entries[layer.sources[0].key].start for path, layer in source.layers.items()}
    return {path: steps[path] for path in sorted(steps, key=lambda path: begins[path])}


def _layer_step(source: Checkpoint, path: str, layer: Layer, target: Target) -> Step:
    """A layer that the source holds quantised."""
    refusal = _left_out(path, layer.shape, target)
    if refusal is None and layer.format == target.format:
        inexact = _inexact(source, layer, target)
        action: Action = "requantised" if inexact else "exact"
        static = _input_scale(target, layer.shape, carried="input_scale" in slots_of(layer))
        return Step(path, action, inexact or "the same format", *_specs(path, layer.shape, target, static))
    if refusal is None and rules.swaps(path):
        reason = f"{layer.format} becomes {target.format}"
        static = _input_scale(target, layer.shape, carried=False)
        return Step(path, "requantised", reason, *_specs(path, layer.shape, target, static))
    block = rules.swaps(path)
    dtype = torch.bfloat16 if block and (target.format is None or target.rest not in REST) else torch.float32
    if target.rest in REST and not (block and target.format is None):
        dtype = REST[target.rest]
    reason = refusal or "embeddings and head are not quantised anew"
    key = from_original(target.spelling, f"{path}.weight")
    return Step(path, "dequantised", reason, {key: Spec(dtype, layer.shape)}, dtype)


def _plain_step(source: Checkpoint, path: str, target: Target) -> Step:
    """A tensor that the source holds unquantised."""
    entry, whole = source.header.entries[source.plain[path]], source.shape_of(path)
    module, _, leaf = path.rpartition(".")
    block = leaf == "weight" and len(whole) == 2 and rules.swaps(module)
    reason = "not one of the Linears worth quantising"
    if block:
        shape = (whole[0], whole[1])
        refusal = _left_out(module, shape, target) or (
            "the source's producer left it unquantised" if source.layers else None
        )
        if refusal is None:
            static = _input_scale(target, shape, carried=False)
            becomes = f"{entry.dtype} becomes {target.format}"
            return Step(path, "quantised", becomes, *_specs(module, shape, target, static))
        reason = refusal
    dtype = _rest_dtype(DTYPES[entry.dtype], path, len(whole), block, target)
    return Step(path, "kept", reason, {from_original(target.spelling, path): Spec(dtype, whole)}, dtype)


def _rest_dtype(held: torch.dtype, path: str, rank: int, block: bool, target: Target) -> torch.dtype:
    """The dtype of a tensor that is written unquantised; `held` is the source's, `block` a block's Linear."""
    if block and target.format is None:
        return torch.bfloat16
    if target.rest in REST:
        return REST[target.rest]
    fp32 = held.itemsize == 1  # an fp8 cast, whose values a wider dtype holds
    if target.rest == "auto" and not block:
        fp32 = fp32 or target.format is None or rules.stored_fp32(path, rank)
    return torch.float32 if fp32 else held


def _left_out(module: str, shape: tuple[int, int], target: Target) -> str | None:
    """Why a weight may not be held in the target's format, or None."""
    if target.format is None:
        return "the target is unquantised"
    for pattern in target.keep:
        if matches(pattern, module):
            return f"kept by {pattern!r}"
    refusal = FORMATS[target.format].refuses(*shape)
    return f"{target.format} does not fit: {refusal}" if refusal else None


def _inexact(source: Checkpoint, layer: Layer, target: Target) -> str | None:
    """Why a layer of the target's own format cannot be carried over bit for bit, or None."""
    corrected = slots_of(layer) & set(corrections.SLOTS)
    if corrected:
        return f"{', '.join(sorted(corrected))} worked into the weight: {target.name} has no place for it"
    shapes = FORMATS[layer.format].layout(*layer.shape).get("scale", (None, ()))[1]
    if len(shapes) < 2 or target.per_channel:
        return None
    scales = [s.key for s in layer.sources if s.slot == "scale"]
    # A plain cast's scale is 1, read off its weight.
    single = [key == f"{layer.module}.weight" or source.header.entries[key].numel == 1 for key in scales]
    return None if single and all(single) else "one scale an output channel becomes one a tensor"


def slots_of(layer: Layer) -> set[str]:
    """The slots that a layer's keys give."""
    return {source.slot for source in layer.sources}


def _input_scale(target: Target, shape: tuple[int, int], *, carried: bool) -> InputScale | None:
    """Where a layer's static input scale comes from; None where there is none, or the target has no key for it."""
    wanted: InputScale | None = "calibrated" if target.calibrated else "carried" if carried else None
    return wanted if wanted and holds_input_scales(target, shape) else None


def holds_input_scales(target: Target, shape: tuple[int, int] = (32, 32)) -> bool:
    """Whether the target's producer has a key for a static input scale."""
    if target.format not in ACTIVATION_TOP:
        return False
    return _blank("", shape, target, True) != _blank("", shape, target, False)


def _specs(
    module: str, shape: tuple[int, int], target: Target, input_scale: InputScale | None
) -> tuple[dict[str, Spec], None, InputScale | None]:
    """The last fields of a Step that quantises: what the target's dialect writes for the layer."""
    return _blank(module, shape, target, input_scale is not None), None, input_scale


def _blank(module: str, shape: tuple[int, int], target: Target, input_scale: bool) -> dict[str, Spec]:
    """Keys, shapes and dtypes that the target's dialect gives one layer, found by encoding tensors without data."""
    assert target.format is not None
    blank = {}
    for slot, (dtype, shapes) in FORMATS[target.format].layout(*shape).items():
        wide = slot == "scale" and target.per_channel
        blank[slot] = torch.empty((shape[0], 1) if wide else shapes[0], dtype=dtype, device="meta")
    if input_scale:
        blank["input_scale"] = torch.empty(1, 1, device="meta")
    return {key: spec_of(tensor) for key, tensor in encoded(module, blank, target).items()}


def encoded(module: str, slots: Mapping[str, torch.Tensor], target: Target) -> dict[str, torch.Tensor]:
    """A layer's tensors as the target's dialect spells them."""
    assert target.format is not None
    name = from_original(target.spelling, module)
    return {f"{name}.{leaf}": tensor for leaf, tensor in target.dialect.encode(target.format, slots).items()}


def matches(pattern: str, module: str) -> bool:
    """Whether a shell pattern names a module, by its path in any spelling."""
    return any(fnmatch.fnmatchcase(from_original(SPELLINGS[name], module), pattern) for name in SPELLINGS)
