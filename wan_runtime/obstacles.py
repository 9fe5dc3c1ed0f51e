"""What stands in the way of a swap: another library's quantisation, hooks, offloaded tensors, sharded weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from wan_runtime.errors import InvalidOption
from wan_runtime.linear import linear_size
from wan_runtime.plan import Decision
from wan_runtime.residents import FLOATS, served


def refuse_unswappable(model: nn.Module, decisions: Sequence[Decision], *, keeps_weights: bool) -> None:
    """Refuse what a swap would lose without a word: another library's quantisation, hooks, offloaded tensors.

    `keeps_weights` is whether the model's own weights are what gets quantised.
    """
    for decision in decisions:
        module = model.get_submodule(decision.path)
        weight = module._parameters.get("weight")
        _refuse_served(module, decision)
        if decision.action == "quantised" and weight is not None:
            held = (
                None
                if type(weight) is nn.Parameter
                else f"a {type(weight).__module__}.{type(weight).__name__}"
            )
            if held is None and keeps_weights and weight.dtype not in FLOATS:
                held = f"{str(weight.dtype).removeprefix('torch.')}, whose scale this model does not hold"
            if held is not None:
                raise InvalidOption(
                    f"{decision.path}.weight is {held}: something else quantised it. Load the model unquantised and "
                    "patch it, or give patch() the quantised file as its checkpoint."
                )
        hook = hook_on(module, decision)
        if hook is not None:
            raise InvalidOption(
                f"{decision.path or 'the model'} carries {hook}, which a patch would break. Patch the model first, "
                "then enable offloading or register hooks."
            )


def _refuse_served(module: nn.Module, decision: Decision) -> None:
    """A server's linear is replaced only where it holds the whole weight and adds its own bias."""
    size = linear_size(module)
    if size is None or not served(module) or decision.action not in ("quantised", "linear"):
        return
    whole = (getattr(module, "output_size", size[0]), getattr(module, "input_size", size[1]))
    if whole != size:
        raise InvalidOption(
            f"{decision.path}.weight is a tensor-parallel shard, {list(size)} of {list(whole)}. Patch with tensor "
            "parallelism off; sequence parallelism and replicas are fine."
        )
    if getattr(module, "skip_bias_add", False):
        raise InvalidOption(f"{decision.path} hands its bias on to be added elsewhere (skip_bias_add).")


def hook_on(module: nn.Module, decision: Decision) -> str | None:
    """A hook that would outlive its module, or that holds the module's tensors; in words."""
    leaf = decision.action in ("quantised", "linear", "resident")
    accelerates = getattr(module, "_hf_hook", None)
    if accelerates is not None and (leaf or getattr(accelerates, "offload", False)):
        return "an accelerate hook"
    registry = getattr(module, "_diffusers_hook", None)
    if (
        registry is not None
        and registry.hooks
        and (leaf or registry.get_hook("group_offloading") is not None)
    ):
        return "a diffusers hook"
    if decision.action == "quantised" and (module._forward_hooks or module._forward_pre_hooks):
        return "a forward hook"
    return None
