"""Executes a conversion's steps: reads a layer, makes the new file's tensors of it, several layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from wan_runtime.ahead import ahead
from wan_runtime.checkpoint import Checkpoint, read_layer, read_plain
from wan_runtime.errors import BadTensor
from wan_runtime.progress import sizes_of
from wan_runtime.quantising import Weight, cast, plain_weight, quantise, quantised_weight
from wan_runtime.transcoding import ACTIVATION_TOP, Step, Target, encoded

BUDGET = 384 * 2**20  # bytes of layers read and quantised ahead of the one being written


@dataclass(frozen=True)
class Making:
    """How the steps are executed; the bytes written do not depend on `threads`.

    activations: original module path -> largest magnitude of its input, or None.
    """

    device: torch.device
    scale: str
    activations: Mapping[str, float] | None
    threads: int


@dataclass(frozen=True)
class Made:
    """The new file's tensors of one layer or plain tensor, and the error that quantising it anew added."""

    path: str
    tensors: Mapping[str, torch.Tensor]
    error: float | None = None


def made(source: Checkpoint, steps: Mapping[str, Step], target: Target, making: Making) -> Iterator[Made]:
    """Every step's tensors, in the steps' order."""
    read = sizes_of(source)
    own = torch.get_num_threads()
    torch.set_num_threads(
        max(own // making.threads, 1)
    )  # each worker has its share of the cores, and none waits
    try:
        yield from ahead(
            steps.values(),
            lambda step: _step_made(source, step, target, making),
            lambda step: read[step.path] + sum(spec.nbytes for spec in step.specs.values()),
            threads=making.threads,
            budget=BUDGET,
        )
    finally:
        torch.set_num_threads(own)


def _step_made(source: Checkpoint, step: Step, target: Target, making: Making) -> Made:
    layer = source.layers.get(step.path)
    if layer is None:
        plain = read_plain(source, step.path).to(making.device)
        if step.action == "kept":
            return Made(step.path, _kept(source, step, plain))
        return _quantised(step, plain_weight(plain), {}, target, making)
    slots = {name: tensor.to(making.device) for name, tensor in read_layer(source, step.path).items()}
    if step.action == "exact":
        return Made(step.path, encoded(step.module, _carried(slots, step, target, making), target))
    weight = quantised_weight(layer.format, slots, layer.shape)
    if step.action == "requantised":
        return _quantised(step, weight, slots, target, making)
    assert step.dtype is not None
    dense = cast(weight, step.dtype, making.device)
    _check_range(source, step, dense)
    return Made(step.path, dict.fromkeys(step.specs, dense))


def _kept(source: Checkpoint, step: Step, plain: torch.Tensor) -> dict[str, torch.Tensor]:
    assert step.dtype is not None
    tensor = plain.to(step.dtype)
    _check_range(source, step, tensor)
    return dict.fromkeys(step.specs, tensor)


def _check_range(source: Checkpoint, step: Step, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
        key = source.plain.get(step.path, step.path)
        raise BadTensor(
            source.path, key, "it has values beyond fp16's 65504; write the rest in bf16 or fp32."
        )


def _carried(
    slots: Mapping[str, torch.Tensor], step: Step, target: Target, making: Making
) -> dict[str, torch.Tensor]:
    """The slots of a layer as they are; a scale a tensor is repeated where the target has one an output channel."""
    carried = {**slots, **_input_scale(slots, step, target, making)}
    if step.input_scale is None:
        carried.pop("input_scale", None)
    if target.per_channel and "scale" in carried:
        carried["scale"] = carried["scale"].expand(carried["payload"].shape[0], 1).contiguous()
    return carried


def _quantised(
    step: Step, weight: Weight, slots: Mapping[str, torch.Tensor], target: Target, making: Making
) -> Made:
    assert target.format is not None
    new, error = quantise(weight, target.format, per_channel=target.per_channel, scale=making.scale)
    new |= _input_scale(slots, step, target, making)
    return Made(step.path, encoded(step.module, new, target), error)


def _input_scale(
    slots: Mapping[str, torch.Tensor], step: Step, target: Target, making: Making
) -> dict[str, torch.Tensor]:
    """The slot "input_scale" [1, 1] where the step says that the layer gets one."""
    if step.input_scale is None:
        return {}
    if step.input_scale == "carried":
        return {"input_scale": slots["input_scale"]}
    assert making.activations is not None and target.format is not None
    amax = making.activations[step.module]
    return {"input_scale": torch.full((1, 1), amax / ACTIVATION_TOP[target.format], device=making.device)}
