"""Executes a plan and can undo it: the only code that sets a module.

With a file, everything is read and checked into a stage beside the model first (wan_runtime.staging), and the model
changes only when the whole file was right; a failed load leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wan_runtime.corrections import effective_weight
from wan_runtime.errors import InvalidOption
from wan_runtime.linear import QuantLinear, linear_size, quantised_layers, settle_biases
from wan_runtime.obstacles import hook_on
from wan_runtime.plan import Decision, bare
from wan_runtime.residents import COMPUTE_DTYPE, become, restore
from wan_runtime.staging import Stage, quantised

STATE = "_wan_runtime"  # attribute of a patched model: its Patched record


@dataclass(frozen=True)
class Patched:
    """What `undo` needs: the decisions, and the dtypes that the host's parameters had, by name."""

    decisions: tuple[Decision, ...]
    before: Mapping[str, torch.dtype]
    report: object


def execute(
    model: nn.Module,
    decisions: Sequence[Decision],
    staged: Stage | None,
    dtype: torch.dtype,
    device_type: str,
    *,
    static: bool = False,
) -> Mapping[str, torch.dtype]:
    """Make the model what the plan says; returns what its parameters were, by name, for `undo`.

    Without a stage the weights come from the model itself, one layer at a time.
    """
    before = {name: p.dtype for name, p in model.named_parameters()}
    for decision in decisions:
        module = model.get_submodule(decision.path)
        tensors = staged.tensors.get(bare(decision.path), {}) if staged else {}
        if decision.action == "quantised":
            slots = staged.slots.pop(bare(decision.path)) if staged else None
            layer = _layer(decision, module, slots, tensors.get("bias"), dtype, device_type, static)
            set_module(model, decision.path, layer)
        else:
            _fill(module, tensors, decision)
            become(module, decision.action)
    settle_biases(layer for _, layer in quantised_layers(model))
    mark = torch.empty(0, dtype=dtype, device=next(model.parameters()).device)
    model.register_buffer(COMPUTE_DTYPE, mark, persistent=False)
    return before


def _layer(
    decision: Decision,
    module: nn.Module,
    slots: dict[str, torch.Tensor] | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    device_type: str,
    static: bool,
) -> QuantLinear:
    size = linear_size(module)
    assert size is not None and decision.format and decision.backend and decision.compute
    if slots is None:
        slots = quantised(decision, module.get_parameter("weight").detach())
        held = module._parameters["bias"]
        bias = None if held is None else held.detach()
    layer = QuantLinear(
        size[1],
        size[0],
        format=decision.format,
        slots=slots,
        bias=bias,
        backend=decision.backend,
        compute=decision.compute,
        planned_for=device_type,
        static=static,
        reads_as=dtype,
        replaces=_emptied(module),
    )
    return layer.train(module.training)


def _emptied(module: nn.Module) -> nn.Module:
    """A module whose tensors are gone to meta, for `undo`; what hosts noted on its parameters stays on them."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[leaf] = _like(parameter, parameter.detach().to("meta"))
    return module


def _like(parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


def _fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], decision: Decision) -> None:
    """Give a module's own parameters their staged values, or cast up what they hold.

    Without a file a Linear that stays unquantised keeps its weight's dtype: it is cast for each product, and nothing
    is lost that `undo` would have to give back.
    """
    for leaf, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        own = decision.action == "linear" and leaf == "weight"
        value = tensors[leaf] if tensors else parameter.detach().to(parameter.dtype if own else torch.float32)
        module._parameters[leaf] = _like(parameter, value)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module where another was."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def set_parameter(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    """Give a module's own parameter a value, from a file, without a gradient."""
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """The host's own buffers (RoPE tables) to where its weights are; they are made by code and in no file."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def undo(model: nn.Module) -> None:
    """Put the module tree back: Linears with dequantised weights, every tensor in the dtype it had."""
    patched = patched_state(model)
    if patched is None:
        raise InvalidOption("the model is not patched, so there is nothing to undo.")
    for decision in patched.decisions:
        hook = hook_on(model.get_submodule(_located(model, decision.path)), decision)
        if hook is not None:
            raise InvalidOption(
                f"{decision.path or 'the model'} carries {hook}, which unpatching would break. Turn offloading off "
                "(pipe.remove_all_hooks(), accelerate's remove_hook_from_submodules(model), for group offloading "
                "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook('group_offloading')) "
                "and remove hooks first."
            )
    for decision in patched.decisions:
        path = _located(model, decision.path)
        module = model.get_submodule(path)
        if isinstance(module, QuantLinear):
            set_module(model, path, _refilled(module, decision.path, patched.before))
            continue
        restore(module)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{decision.path}.{leaf}" if decision.path else leaf
                parameter.data = parameter.data.to(patched.before[name])
    del model._buffers[COMPUTE_DTYPE]
    model._non_persistent_buffers_set.discard(COMPUTE_DTYPE)
    delattr(model, STATE)


def _located(model: nn.Module, path: str) -> str:
    """Where a module is now: adapters loaded or unloaded since the patch put it in or out of a `base_layer`."""
    path = bare(path)
    while path and isinstance(getattr(model.get_submodule(path), "base_layer", None), nn.Module):
        path = f"{path}.base_layer"
    return path


def _refilled(module: QuantLinear, path: str, before: Mapping[str, torch.dtype]) -> nn.Module:
    """The module that a QuantLinear replaced, with the dequantised weight and the bias in it."""
    replaced: nn.Module = module.__dict__["replaces"]
    weight = effective_weight(module.format, module.slots)
    for leaf, value in (("weight", weight), ("bias", module.bias)):
        parameter = replaced._parameters[leaf]
        if parameter is not None and value is not None:
            held = value.detach().to(before[f"{path}.{leaf}"])
            replaced._parameters[leaf] = _like(parameter, held)
    return replaced.train(module.training)


def patched_state(model: nn.Module) -> Patched | None:
    """The record a patched model carries, or None."""
    state = getattr(model, "__dict__", {}).get(STATE)  # what is no module is refused later, in words
    return state if isinstance(state, Patched) else None


def remember(model: nn.Module, patched: Patched) -> None:
    """Attach the record that makes a second patch a no-op and `undo` possible."""
    model.__dict__[STATE] = patched


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters, on whatever device."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def verify_residents(model: nn.Module, decisions: Sequence[Decision]) -> None:
    """Assert after every patch that what must be fp32 is, and that no slot was left on the meta device."""
    for decision in decisions:
        module = model.get_submodule(decision.path)
        for leaf, parameter in module._parameters.items():
            if parameter is None or (decision.action == "linear" and leaf == "weight"):
                continue
            is_payload = (
                isinstance(module, QuantLinear) and leaf != "bias" and not parameter.is_floating_point()
            )
            if not is_payload and parameter.dtype is not torch.float32:
                raise AssertionError(
                    f"{decision.path}.{leaf} is {parameter.dtype} after the patch and must be fp32."
                )
            if parameter.is_meta:
                raise AssertionError(f"{decision.path}.{leaf} was left on the meta device by the patch.")
