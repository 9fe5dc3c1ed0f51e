"""QuantLinear: an `nn.Linear` whose weight is a format's slots and whose bias stays fp32.

The slots are parameters without gradient rather than buffers, because accelerate's `cpu_offload` leaves buffers on the
GPU unless told otherwise, and the payload is what offloading is for. They are uint8 codes and fp32 scales, so no host
that asks a parameter for the compute dtype sees float8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from wan_runtime import corrections
from wan_runtime.autograd import gradient_wanted, writes
from wan_runtime.backends import (
    Multiply,
    _gradients,
    added_multiplier,
    biased_multiplier,
    coded_multiplier,
    multiplier,
)
from wan_runtime.errors import QuantisedWeight
from wan_runtime.formats import FORMATS
from wan_runtime.residents import AUTOCASTS, Move, assign_in_own_dtypes, keeping_dtype, served


class WeightCopy(torch.Tensor):
    """A dequantised weight that refuses to be written.

    It is a copy, so a write (an adapter merging itself, `weight.data = ...`) would be lost without a word. What is
    computed from it is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        out = (kwargs or {}).get("out")
        if (writes and args and isinstance(args[0], cls)) or isinstance(out, cls):
            raise QuantisedWeight(name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _ALIASES:
            return result.as_subclass(cls)
        return result.as_subclass(torch.Tensor) if isinstance(result, cls) else result


# Property setters (`weight.data = ...`) reach __torch_function__ under the name __set__.
_WRITES = frozenset(
    f"__{name}__"
    for name in ("set", "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
                 "iand", "ior", "ixor", "ilshift", "irshift")
)  # fmt: skip
_ALIASES = frozenset({torch.Tensor.data.__get__, torch.Tensor.detach})  # type: ignore[attr-defined]


class QuantLinear(nn.Linear):
    """A Linear that holds its weight quantised.

    Input [..., in_features] in any floating dtype, 0 or more leading dimensions; output [..., out_features] in the
    input's dtype. The bias (fp32 [out_features] or None) is added in fp32. `weight` is a dequantised copy for readers
    that want one (adapters, inspection) in `reads_as`, made anew at each access.

    Args:
        format: name of a weight format; `slots` holds its canonical slots, optionally also "input_scale" [1, 1] and
            corrections (wan_runtime.corrections), which are applied around the backend's product.
        backend, compute: who multiplies and in what; see wan_runtime.backends.
        planned_for: the device type the plan was made for; on another one the layer dequantises and multiplies, so
            that a model planned for the GPU still runs where it lies.
        static: quantise activations with the file's input_scale instead of one dynamic scale a token.
        replaces: the module this one stands for, its tensors on meta: what `unpatch` fills and puts back. It also
            says how to answer: a server's linear (see `served`) answers the pair (output, None).

    Raises ValueError for a slot that neither the format nor a correction has: it would change the weight in silence.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: str,
        slots: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None,
        backend: str,
        compute: str,
        planned_for: str = "cpu",
        static: bool = False,
        reads_as: torch.dtype = torch.bfloat16,
        replaces: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a float weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.backend, self.compute, self.static = format, backend, compute, static
        self.planned_for = planned_for
        self.reads_as = reads_as
        self.__dict__["replaces"] = replaces  # not a child: it holds nothing that moves
        self.pair = replaces is not None and served(replaces)
        fp32 = None if bias is None else nn.Parameter(bias.to(torch.float32), requires_grad=False)
        self.register_parameter("bias", fp32)
        self._short_bias: bool | None = None  # not asked yet: see `settle_biases`
        self._bias_writes = 0  # that torch had counted when it was asked
        _, around = corrections.split(format, slots)
        self.corrected = bool(
            around
        )  # a fused path that hands a kernel the layer's input must look here first
        self._group = corrections.group_of(
            around
        )  # held beside its slot, as reading a GPU's value would wait for it
        # Codes last: hosts take the first parameter's dtype for a floating-point one.
        for name, tensor in sorted(slots.items(), key=lambda slot: not slot[1].is_floating_point()):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._bind()

    def _bind(self) -> None:
        """Look the multipliers up once, so that a forward pays for no catalogue."""
        self._multiply: Multiply = multiplier(self.backend, self.format, self.compute)
        self.coded = coded_multiplier(self.backend, self.format, self.compute)
        self.added = added_multiplier(self.backend, self.format, self.compute)
        self._biased = biased_multiplier(self.backend, self.format, self.compute)
        self._dequantize = FORMATS[self.format].dequantize
        anywhere = self.compute in ("bf16", "fp32")
        self._elsewhere: Multiply = self._multiply if anywhere else multiplier("torch", self.format, "bf16")

    @property
    def slots(self) -> dict[str, torch.Tensor]:
        """The weight's slots, its corrections, and its input scale where it has one."""
        return {name: p for name, p in self._parameters.items() if name != "bias" and p is not None}

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight [out_features, in_features] in `reads_as`: a copy, never the storage."""
        weight = corrections.effective_weight(self.format, self.slots)
        return weight.to(self.reads_as).as_subclass(WeightCopy)

    @weight.setter
    def weight(self, value: object) -> None:
        raise QuantisedWeight("weight = ...")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # nn.Module.__setattr__ comes here before any property
            raise QuantisedWeight("weight = ...")
        if name == "bias":
            self._short_bias = None
        super().register_parameter(name, param)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
        unexpected_keys: Any, error_msgs: list[str],
    ) -> None:  # fmt: skip
        assign_in_own_dtypes(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._short_bias = None
        if f"{prefix}rotation" in state_dict and self._group is not None:
            self._group = int(state_dict[f"{prefix}rotation"].item())
        if (
            f"{prefix}weight" in state_dict
        ):  # strict=False would drop it, and the layer would keep other weights
            error_msgs.append(
                f"{prefix}weight is a plain weight and this layer is quantised ({self.format}). Unpatch the model "
                "before loading plain weights, or patch it with the file."
            )

    def forward(self, input: torch.Tensor) -> Any:
        slots = self.slots
        static = slots.pop("input_scale", None)
        kind = input.device.type
        dtype = _result_dtype(input)
        rows = input.reshape(math.prod(input.shape[:-1]), self.in_features).to(dtype)
        multiply, wanted = self._multiplier(kind, rows)
        bias: torch.Tensor | None = self.bias
        if self.corrected:
            rows, scaled = corrections.before(rows, slots, self._group)
            product = corrections.after(multiply(rows, slots, static if self.static else None), scaled, slots)
        elif not wanted and self._adds_bias(kind, dtype):
            assert self._biased is not None and bias is not None
            product = self._biased(rows, slots, static if self.static else None, bias.to(torch.bfloat16))
            bias = None
        else:
            product = multiply(rows, slots, static if self.static else None)
        if product.dtype != dtype:
            product = product.float()
        if bias is not None:
            product = product.add_(bias)  # in place and in one pass: torch sums in fp32, then rounds
        output = product.to(dtype).reshape(*input.shape[:-1], self.out_features)
        return (output, None) if self.pair else output

    def _multiplier(self, kind: str, rows: torch.Tensor) -> tuple[Multiply, bool]:
        """What multiplies rows on a kind of device, and whether a gradient is to flow back into them."""
        multiply = self._multiply if kind == self.planned_for else self._elsewhere
        wanted = gradient_wanted((rows,))
        if wanted and multiply is not self._elsewhere:  # which dequantises, and is differentiated by torch
            multiply = functools.partial(_gradients.multiplied, multiply, self._dequantize)
        return multiply, wanted

    def _adds_bias(self, kind: str, dtype: torch.dtype) -> bool:
        """Whether the product itself adds the bias: it can, the bias is exactly bf16, and so is the answer."""
        if self._biased is None or kind != self.planned_for or dtype != torch.bfloat16:
            return False
        # A compiled graph must not hang on a value.
        if not torch.compiler.is_compiling() and (
            self._short_bias is None or self._bias_writes != writes(self.bias)
        ):
            settle_biases([self])
        return bool(self._short_bias)

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        # What `weight` reads as follows the host's dtype; the storage does not.
        self.reads_as = fn(
            torch.empty(0, dtype=self.reads_as, device=self.get_parameter("payload").device)
        ).dtype
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        bound = ("_multiply", "_elsewhere", "_biased", "_dequantize", "added", "coded")
        return {name: value for name, value in self.__dict__.items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, compute={self.compute}, backend={self.backend}"
        )


def settle_biases(layers: Iterable[QuantLinear]) -> None:
    """Find whether every value of each layer's bias is a bf16 number, so that a product may add it as one and lose
    nothing: one wait for the GPU for them all. A layer that was left out asks for itself in its first forward."""
    asked: list[QuantLinear] = []
    exact: list[torch.Tensor] = []
    for layer in layers:
        bias: torch.Tensor | None = layer.bias
        layer._short_bias, layer._bias_writes = False, writes(bias)
        if bias is not None and not bias.is_meta:
            asked.append(layer)
            exact.append((bias == bias.to(torch.bfloat16).float()).all())
    for device in {answer.device for answer in exact}:
        here = [n for n, answer in enumerate(exact) if answer.device == device]
        for number, short in zip(here, torch.stack([exact[n] for n in here]).tolist(), strict=True):
            asked[number]._short_bias = short


def _result_dtype(input: torch.Tensor) -> torch.dtype:
    """The dtype an nn.Linear would answer in: autocast's where it is on, else the input's."""
    kind = input.device.type
    if kind in AUTOCASTS and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return input.dtype


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) features of a linear that holds a weight, of either family; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module._parameters.get("weight")
    if not served(module) or weight is None or weight.dim() != 2:
        return None
    return weight.shape[0], weight.shape[1]


def quantised_layers(model: nn.Module) -> Iterable[tuple[str, QuantLinear]]:
    """Every QuantLinear of a model with its path, wrapped ones included."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear))
