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

from wan_runtime import rules
from wan_runtime.checkpoint import Checkpoint
from wan_runtime.dialects import Dialect, Layer
from wan_runtime.formats import FORMATS
from wan_runtime.header import DTYPES
from wan_runtime.names import SPELLINGS, Spelling, from_original
from wan_runtime.writing import Spec, spec_of

Action = Literal["exact", "requantised", "quantised", "dequantised", "kept"]
QUANTISING = ("exact", "requantised", "quantised")


@dataclass(frozen=True)
class Target:
    """What is written: the dialect, its weight format (bf16: none), the spelling, and what to leave unquantised."""

    name: str
    dialect: Dialect
    format: str | None
    spelling: Spelling
    skip: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """What becomes of one layer or plain tensor.

    exact        the source's codes and scales, bit for bit, as the target's dialect spells them.
    requantised  dequantised and quantised again: the source's error and the target's add up.
    quantised    from an unquantised source.
    dequantised  a quantised layer that the target holds unquantised, in `dtype`.
    kept         an unquantised tensor, in `dtype`.

    `specs` are the new file's tensors by key; `input_scale` says that the layer's static one is carried over.
    """

    path: str
    action: Action
    reason: str
    specs: Mapping[str, Spec]
    dtype: torch.dtype | None = None
    input_scale: bool = False


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
    static = any(s.slot == "input_scale" for s in layer.sources)
    if refusal is None and layer.format == target.format:
        carried = _same_arrangement(source, layer)
        action: Action = "exact" if carried else "requantised"
        reason = "the same format" if carried else "one scale an output channel becomes one a tensor"
        return Step(path, action, reason, _quantised_specs(path, layer.shape, target, static), None, static)
    if refusal is None and rules.swaps(path):
        reason = f"{layer.format} becomes {target.format}"
        return Step(path, "requantised", reason, _quantised_specs(path, layer.shape, target, False))
    dtype = torch.bfloat16 if rules.swaps(path) else torch.float32
    reason = refusal or "embeddings and head are not quantised anew"
    key = from_original(target.spelling, f"{path}.weight")
    return Step(path, "dequantised", reason, {key: Spec(dtype, layer.shape)}, dtype)


def _plain_step(source: Checkpoint, path: str, target: Target) -> Step:
    """A tensor that the source holds unquantised."""
    entry = source.header.entries[source.plain[path]]
    module, _, leaf = path.rpartition(".")
    if leaf == "weight" and len(entry.shape) == 2 and rules.swaps(module):
        shape = (entry.shape[0], entry.shape[1])
        refusal = _left_out(module, shape, target) or (
            "the source's producer left it unquantised" if source.layers else None
        )
        if refusal is None:
            specs = _quantised_specs(module, shape, target, False)
            return Step(path, "quantised", f"{entry.dtype} becomes {target.format}", specs)
        reason, held = refusal, torch.bfloat16 if target.format is None else None
    else:
        reason = "not one of the Linears worth quantising"
        fp32 = target.format is None or rules.stored_fp32(path, len(entry.shape))
        held = torch.float32 if fp32 else None
    dtype = DTYPES[entry.dtype]
    dtype = held or (torch.float32 if dtype.itemsize == 1 else dtype)
    return Step(path, "kept", reason, {from_original(target.spelling, path): Spec(dtype, entry.shape)}, dtype)


def _left_out(module: str, shape: tuple[int, int], target: Target) -> str | None:
    """Why a weight may not be held in the target's format, or None."""
    if target.format is None:
        return "the target is unquantised"
    for pattern in target.skip:
        if matches(pattern, module):
            return f"skipped by {pattern!r}"
    refusal = FORMATS[target.format].refuses(*shape)
    return f"{target.format} does not fit: {refusal}" if refusal else None


def _same_arrangement(source: Checkpoint, layer: Layer) -> bool:
    """Whether the layer has one fp32 scale a tensor, as every target has; a plain cast's is 1, read off its weight."""
    [scale] = [s for s in layer.sources if s.slot == "scale"]
    return scale.key == f"{layer.module}.weight" or source.header.entries[scale.key].numel == 1


def _quantised_specs(
    module: str, shape: tuple[int, int], target: Target, input_scale: bool
) -> dict[str, Spec]:
    """Keys, shapes and dtypes that the target's dialect gives one layer, found by encoding tensors without data."""
    assert target.format is not None
    layout = FORMATS[target.format].layout(*shape)
    blank = {
        slot: torch.empty(shapes[0], dtype=dtype, device="meta") for slot, (dtype, shapes) in layout.items()
    }
    if input_scale:
        blank["input_scale"] = torch.empty(1, 1, device="meta")
    return {key: spec_of(tensor) for key, tensor in encoded(module, blank, target).items()}


def encoded(module: str, slots: Mapping[str, torch.Tensor], target: Target) -> dict[str, torch.Tensor]:
    assert target.format is not None
    name = from_original(target.spelling, module)
    return {f"{name}.{leaf}": tensor for leaf, tensor in target.dialect.encode(target.format, slots).items()}


def matches(pattern: str, module: str) -> bool:
    """Whether a shell pattern names a module, by its path in any spelling."""
    return any(fnmatch.fnmatchcase(from_original(SPELLINGS[name], module), pattern) for name in SPELLINGS)
