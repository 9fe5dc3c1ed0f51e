"""What the bytes of a quantised weight mean: one file a weight format, in one canonical arrangement.

A dialect says how a producer spells a format in a file (key names, nibble order, scale layout); here each format has
one arrangement, the one that `QuantLinear` holds and the backends read. Slots never have a float8 dtype: codes are
stored as uint8, so that no host takes float8 for a compute dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from wan_runtime.catalogue import Catalogue
from wan_runtime.doubts import Refuse, at_once
from wan_runtime.errors import UnknownName

Slots = Mapping[str, "torch.Tensor"]


class BadSlot(ValueError):
    """A slot whose values no quantiser writes. `slot` names it."""

    def __init__(self, slot: str, problem: str) -> None:
        self.slot = slot
        super().__init__(problem)


class Check(Protocol):
    """Refuses slots whose values are damaged; `refuse` decides when (wan_runtime.doubts)."""

    def __call__(self, slots: Slots, refuse: Refuse = at_once) -> None: ...


@dataclass(frozen=True)
class Format:
    """One weight format.

    layout      (out_features, in_features) -> slot name -> (dtype, allowed shapes); the first slot is "payload".
    refuses     (out_features, in_features) -> why a weight of that size cannot have this format, or None.
    quantize    (float weight [out, in], per_channel) -> slots, by the format's amax rule; `per_channel` asks for one
                scale an output channel where the format has that choice.
    dequantize  slots -> float32 weight [out, in], exact up to one fp32 rounding per product.
    check       refuses with BadSlot values that are damaged: NaN codes; a scale that is NaN, infinite or negative, or
                zero beside non-zero codes.
    bits        bits a weight takes, block scales included.
    sizes       slots -> the largest magnitude in each row of n kinds of scale that lie within the payload, [out, n];
                None where scales have slots.
    """

    name: str
    layout: Callable[[int, int], dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...]]]]
    refuses: Callable[[int, int], str | None]
    quantize: Callable[[torch.Tensor, bool], dict[str, torch.Tensor]]
    dequantize: Callable[[Slots], torch.Tensor]
    check: Check
    bits: float
    sizes: Callable[[Slots], torch.Tensor] | None = None


class Formats(Catalogue[Format]):
    """What a weight can be quantised to, one file each; unlisted, by name alone, ggml's types, which are only read."""

    def __getitem__(self, name: str) -> Format:
        if not name.startswith("ggml_"):
            return super().__getitem__(name)
        held: Mapping[str, Format] = importlib.import_module(f"{self.package}._ggml").FORMATS
        if name not in held:
            raise UnknownName("format", name, [*self, *held])
        return held[name]


FORMATS: Formats = Formats("wan_runtime.formats", Format)
STRIP, STRIP_ON_GPU = 2**20, 2**27  # elements


def strips(payload: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A payload in runs of rows whose checks take little memory.

    On the CPU, blocks as large as a weight that come and go split the heap: a patch with a file of 2.4 GiB took that.
    On a GPU each run costs a few launches, and WAN's largest weights are one.
    """
    if not payload.numel():
        return (payload,)
    size = STRIP if payload.device.type == "cpu" else STRIP_ON_GPU
    return tuple(torch.split(payload, max(1, size // payload[0].numel())))


def check_scale(slots: Slots, slot: str, refuse: Refuse = at_once) -> None:
    """Refuse a scale that is NaN, infinite or negative."""
    scale = slots[slot]
    if not scale.numel():
        return
    least, largest = torch.aminmax(scale)  # NaN where one is
    refuse(
        ~(largest < torch.inf),
        lambda: BadSlot(slot, "the scale is NaN or infinite; the file is damaged or was never calibrated."),
    )
    refuse(
        least < 0,
        lambda: BadSlot(slot, f"the scale is negative ({least.item():g}); no quantiser writes that."),
    )


def check_zero_scale(
    slot: str, zero: torch.Tensor, codes_nonzero: torch.Tensor, refuse: Refuse = at_once
) -> None:
    """Refuse a zero scale beside non-zero codes: the weights it hides are lost. Both broadcast together."""
    refuse(
        (zero & codes_nonzero).any(),
        lambda: BadSlot(slot, "the scale is zero beside non-zero codes; the weights would vanish."),
    )


# Scaling by amax puts the largest code at 448 (e5m2: or 57344), and the tensors of a WAN model stay below about 20.
# These are the magnitudes from 240 (e5m2: 256) to the largest finite one.
_SCALED_CODES = {"torch.float8_e4m3fn": (0x77, 0x7E), "torch.float8_e5m2": (0x5C, 0x7B)}


def check_cast(tensor: torch.Tensor, refuse: Refuse = at_once) -> None:
    """Refuse with ValueError an fp8 tensor without a scale that fills fp8's range as only scaled codes do."""
    first, last = _SCALED_CODES[str(tensor.dtype)]
    magnitudes = tensor.view(torch.uint8) & 0x7F
    many = ((magnitudes >= first) & (magnitudes <= last)).sum()
    refuse(
        many > 0,
        lambda: ValueError(
            f"{int(many)} of its values are 240 or more, and no weight is that large: the codes were scaled and the "
            "file has lost their scales. Download the original again."
        ),
    )
