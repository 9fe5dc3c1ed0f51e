"""Modules that stay fp32 inside a bf16 host, by a subclass that casts at its edges.

Stock hosts fail with an fp32 patch embedding, head or time projection (the dtypes of input and weight differ) and cast
everything on `.to(dtype)`. Each resident's class becomes a subclass of its own class that computes in fp32, returns
the dtype it was given, and keeps its parameters' dtype under `_apply` (`.to(dtype)`, `.half()`, a pipeline's `.to`).
The subclasses are made on demand from the base class alone, so deepcopy and pickle rebuild them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wan_runtime.errors import InvalidOption, QuantisedWeight
from wan_runtime.fp32_products import product

Move = Callable[[torch.Tensor], torch.Tensor]
COMPUTE_DTYPE = (
    "_wan_runtime_dtype"  # an empty tensor on the model: follows `.to(dtype)`, so it is the compute dtype
)
FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
# Asked once, here: torch 2.11's compiler does not know the question, and would break its graph in a forward.
AUTOCASTS = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def served(module: nn.Module) -> bool:
    """Whether a module is a linear of vLLM's family of servers (SGLang's and FastVideo's descend from it).

    They are no nn.Linear: sizes are `input_size` and `output_size`, and the answer is (output, bias not added or None).
    """
    return any(cls.__name__ == "LinearBase" for cls in type(module).__mro__)


def keeping_dtype(move: Move) -> Move:
    """A `Module._apply` function that moves a tensor's device and never changes its dtype."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        moved = move(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return keep


def assign_in_own_dtypes(
    module: nn.Module, given: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Cast what `load_state_dict(assign=True)` is about to put in the place of a module's own tensors to their dtypes,
    as it is cast where it is copied into them."""
    if not metadata.get("assign_to_params_buffers", False):
        return
    for name, own in (*module._parameters.items(), *module._buffers.items()):
        new = given.get(prefix + name)
        if own is not None and isinstance(new, torch.Tensor) and {own.dtype, new.dtype} <= FLOATS:
            given[prefix + name] = new.to(own.dtype)


class OwnDtype(nn.Module):
    """Keeps the dtype of the module's own parameters and buffers; its children decide for themselves."""

    _wan_runtime_kind: tuple[Kind, type[nn.Module]]

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        own_dtype = self._buffers.pop(COMPUTE_DTYPE, None)
        super()._apply(keeping_dtype(fn), recurse=False)  # type: ignore[no-untyped-call]
        if own_dtype is not None:
            self._buffers[COMPUTE_DTYPE] = fn(own_dtype)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        assign_in_own_dtypes(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, self._wan_runtime_kind, self.__getstate__()  # type: ignore[no-untyped-call]


class Resident(OwnDtype):
    """A leaf computed in fp32: floating-point inputs are cast up, the result back to the first input's dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        with _no_autocast(first):
            if first is None or not first.is_floating_point() or kwargs or len(args) > 1:
                made = super().forward(*map(_up, args), **{name: _up(a) for name, a in kwargs.items()})
            else:
                made = self.result(first)
        return made if first is None or not first.is_floating_point() else _as(first.dtype, made)

    def result(self, x: torch.Tensor) -> Any:
        """Of a floating-point tensor, in any dtype."""
        if original_class(self) is nn.Linear:
            return product(x, self.weight, self.bias)
        return super().forward(x.float())


class _Fp32Bias(OwnDtype):
    """An unquantised Linear: the weight in the compute dtype, the bias in fp32 and added in fp32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        keep, bias = keeping_dtype(fn), self._parameters["bias"]

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return keep(tensor) if tensor is bias else fn(tensor)

        return super(OwnDtype, self)._apply(move, recurse)  # type: ignore[no-untyped-call]

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """Without the bias, which whoever passes over the product anyway may add: a pass for it alone takes long."""
        return nn.functional.linear(input, self.weight.to(input.dtype))

    def forward(self, input: torch.Tensor) -> Any:
        product = self.product(input)
        if self.bias is not None:
            product = product.add_(self.bias)
        return (product, None) if served(self) else product


class _Model(OwnDtype):
    """The host model itself: `dtype` is the compute dtype, whatever its first parameter is."""

    @property
    def dtype(self) -> torch.dtype:
        marker = self._buffers[COMPUTE_DTYPE]
        assert marker is not None
        return marker.dtype

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what it would write loads nowhere, and a loader that ignores unknown keys makes noise of it."""
        raise InvalidOption(
            "a patched model is not saved with save_pretrained: no loader knows its keys. Write a checkpoint with "
            "wan_runtime.convert, or call wan_runtime.unpatch(model) first."
        )

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Refused before any layer is touched: the first quantised layer would refuse the merge half-way."""
        raise QuantisedWeight("fuse_lora")

    def fuse_qkv_projections(self) -> None:
        """Refused: the merged layers would hold bf16 weights and fp32 biases, and fail in the next forward."""
        raise InvalidOption(
            "a patched model keeps its q, k and v apart: fuse_qkv_projections would make an unquantised copy of them. "
            "Leave it out, as fused blocks quantise the input of all three once, or call it before wan_runtime.patch."
        )


# A name of _KINDS, or a subclass of OwnDtype that a host defines at the top of a module, so that a pickle can find it.
Kind = str | type[OwnDtype]
_KINDS: dict[str, type[nn.Module]] = {
    "own": OwnDtype,
    "resident": Resident,
    "linear": _Fp32Bias,
    "model": _Model,
}


def _no_autocast(tensor: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Autocast would round what a resident computes; entered only where it is on."""
    kind = "cpu" if tensor is None else tensor.device.type
    if kind in AUTOCASTS and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _as(dtype: torch.dtype, result: Any) -> Any:
    """A result, or each of several, in a dtype."""
    if isinstance(result, tuple):
        return tuple(_as(dtype, part) for part in result)
    return result.to(dtype) if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def _up(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@functools.cache
def _subclass(kind: Any, base: Any) -> type[nn.Module]:
    """The subclass of `base` with a kind's behaviour, under the base's own name: hosts look classes up by name."""
    fields = {
        "_wan_runtime_kind": (kind, base),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    made = type(base.__name__, (_KINDS[kind] if isinstance(kind, str) else kind, base), fields)
    _introduce(made, base)
    return made


def _introduce(made: type[nn.Module], base: type[nn.Module]) -> None:
    """Have diffusers' caches take a subclass for its base: what a block takes and gives they look up by its class."""
    helpers = sys.modules.get("diffusers.hooks._helpers")  # there once a model of diffusers is
    registry: Any = getattr(helpers, "TransformerBlockRegistry", None)
    if registry is None or not base.__module__.startswith("diffusers."):
        return
    try:
        known = dataclasses.replace(registry.get(base))
    except ValueError:  # they serve no such block
        return
    registry.register(made, known)
    known._cls = base  # whose forward names its arguments


def _rebuild(kind: Any, base: Any) -> nn.Module:
    cls = _subclass(kind, base)
    return cls.__new__(cls)


def become(module: nn.Module, kind: Kind) -> None:
    """Give a module the behaviour of a kind: own, resident, linear, model or a host's. Its tensors stay as they are."""
    key: Any = kind  # mypy takes no class of modules for hashable
    base: Any = original_class(module)
    unpin(module)
    module.__class__ = _subclass(key, base)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before `become`."""
    kind = getattr(type(module), "_wan_runtime_kind", None)
    return kind[1] if kind else type(module)


def kind_of(module: nn.Module) -> Kind | None:
    """Which kind `become` made a module, or None."""
    kind = getattr(type(module), "_wan_runtime_kind", None)
    return kind[0] if kind else None


def restore(module: nn.Module) -> None:
    """Undo `become`."""
    unpin(module)
    module.__class__ = original_class(module)


def pinned(module: nn.Module) -> bool:
    """Whether a module holds the forward of its own class as an attribute, as hooks of accelerate and diffusers that
    were removed leave it: nothing is in its place, but a change of class would not change it."""
    held: Any = module.__dict__.get("forward")
    return getattr(held, "__self__", None) is module and any(
        held.__func__ is vars(cls).get("forward") for cls in type(module).__mro__
    )


def unpin(module: nn.Module) -> None:
    """Let a module's class say what its forward is, where it is `pinned`."""
    if pinned(module):
        del module.__dict__["forward"]
