"""Sizes that no weight of a WAN model has: an inverted or a lost scale, or a flipped bit of one.

Trained Linears of a WAN transformer have a standard deviation of 0.01 to 0.1 and values below about 20. An inverted
NVFP4 scale is off by its own square, about 1e8, and an inverted FP8 one by 1e6, so the bounds can stand far from every
real weight. Outside the blocks they stand farther: Animate's motion encoder keeps weights of deviation 1.
A layer of zeros is a layer that training has not touched, and passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from wan_runtime.dialects import Layer
from wan_runtime.doubts import Refuse, at_once
from wan_runtime.errors import BadTensor
from wan_runtime.formats import FORMATS, BadSlot, Slots
from wan_runtime.header import Entry

ROWS = 32  # of a layer at least, spread evenly; the whole of a 14B model would take a minute
SMALLEST = 1e-7  # root mean square
LARGEST_RMS = {"blocks": 0.5, "elsewhere": 30.0}
LARGEST_VALUE = {"blocks": 40.0, "elsewhere": 1000.0}
# Of biases, norms and modulation, whose sizes nobody has surveyed; a flipped exponent of bf16 gives 1e30.
LARGEST_OF_ANY = 1e6


def check_size(
    module: str, weight_format: str, slots: Slots, shape: tuple[int, int], refuse: Refuse = at_once
) -> None:
    """Refuse with BadSlot weights of a layer that are far larger or smaller than any WAN model's.

    module: in any spelling. slots: the format's own, [out, ...] each, checked by the format.
    """
    held = FORMATS[weight_format]
    within = None if held.sizes is None else held.sizes(slots)
    parts = [held.dequantize(part).float() for part in _parts(slots, shape[0], within)]
    if not parts[0].numel():
        return
    largest = functools.reduce(torch.maximum, [values.abs().amax() for values in parts])
    rms = parts[0].square().mean().sqrt()
    where = _where(module)
    scale = next((name for name in ("scale", "block_scale") if name in slots), "payload")
    refuse(
        (rms > LARGEST_RMS[where]) | (largest > LARGEST_VALUE[where]),
        lambda: BadSlot(
            scale,
            f"with it the weights reach {float(largest):.3g} (root mean square {float(rms):.3g}), and no WAN model's "
            "do: the scale is inverted, damaged, or of another layer.",
        ),
    )
    refuse(
        (largest > 0) & (rms < SMALLEST),
        lambda: BadSlot(
            scale,
            f"with it the weights are {float(rms):.3g} (root mean square), and a trained layer's are above "
            f"{SMALLEST:g}: the scale is inverted, damaged, or of another layer.",
        ),
    )


def check_plain(
    path: Path, key: str, tensor: torch.Tensor, dialect: str | None, refuse: Refuse = at_once
) -> None:
    """Refuse with BadTensor an unquantised tensor of floats that holds NaN or infinite values, or values beyond any WAN
    model's.

    dialect: by whose name a caller can insist on such values, and None where the caller did.
    """
    matrix = tensor.ndim == 2 and key.endswith(".weight")
    bound = LARGEST_VALUE[_where(key)] if matrix else LARGEST_OF_ANY
    most = torch.finfo(tensor.dtype).max
    allowed = most if dialect is None else min(bound, most)
    low, high = torch.aminmax(tensor)  # NaN where a value is; takes no memory, as a copy of magnitudes would

    def error() -> BadTensor:
        largest = max(abs(float(low)), abs(float(high)))
        if not math.isfinite(largest):
            return BadTensor(path, key, "it holds NaN or infinite values; the file is damaged.")
        return BadTensor(
            path,
            key,
            f"its values reach {largest:.3g}, and no WAN model's go beyond {bound:g}: the file is damaged, or "
            f"its scales were lost. Download or make it again; --dialect {dialect} takes it as it is.",
        )

    refuse(~((low >= -allowed) & (high <= allowed)), error)


def _where(name: str) -> str:
    return "blocks" if {"blocks", "vace_blocks"} & set(name.split(".")) else "elsewhere"


def check_bias(path: Path, layer: Layer, bias: Entry | None) -> None:
    """Raise BadTensor where a layer's bias has not one value a row: the weight is transposed, or of another layer."""
    if bias is not None and bias.shape != (layer.shape[0],):
        raise BadTensor(
            path,
            f"{layer.module}.weight",
            f"it is {layer.shape[0]} x {layer.shape[1]} and its bias has shape {list(bias.shape)}: the weight is "
            "transposed, or one of the two is of another layer.",
        )


def _parts(slots: Slots, out: int, within: torch.Tensor | None) -> Iterator[dict[str, torch.Tensor]]:
    """The slots of some rows: first of rows spread over the layer, then of those whose scales are extreme.

    within: the sizes of scales that have no slot (Format.sizes).
    """
    scales = next((t for name, t in slots.items() if name.endswith("scale") and t.numel() > 1), None)
    count = 1 if scales is None else scales.shape[0]
    height = 1 if count in (1, out) else 1 << (-(-out // count) - 1).bit_length()  # blocks that span rows
    if height == 1:
        yield _rows(slots, slice(None, None, max(1, out // ROWS)), out)
    else:
        yield _block(slots, slots["payload"].new_zeros((), dtype=torch.long), height, out)
    if within is not None:
        yield _rows(slots, within.argmax(0), out)
    if scales is not None and count > 1:
        sizes = scales.float().amax(1)
        for number in (sizes.argmax(), sizes.argmin()):
            yield _block(slots, number, height, out)


def _rows(slots: Slots, index: torch.Tensor | slice, out: int) -> dict[str, torch.Tensor]:
    return {name: t[index] if t.shape[0] == out > 1 else t for name, t in slots.items()}


def _block(slots: Slots, number: torch.Tensor, height: int, out: int) -> dict[str, torch.Tensor]:
    """One row of blocks; a single row where the scales are a row's. The last row again where the block is cut short."""
    rows = (number * height + torch.arange(height, device=number.device)).clamp(max=out - 1)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == out:
            return tensor[rows]
        return tensor if tensor.shape[0] == 1 else tensor[number.reshape(1)]

    return {name: cut(tensor) for name, tensor in slots.items()}
