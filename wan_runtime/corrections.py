"""What a producer does around a weight's product, in slots that any format may have beside its own.

slot        dtype    shape      meaning
pre_scale   float32  [1, in]    the input is multiplied by it first (AWQ, SmoothQuant: the weight was divided by it)
rotation    int32    [1]        group size g: the scaled input's groups of g are multiplied by the regular Hadamard
                                matrix of that size (ConvRot); g is a power of 4 that divides `in`
low_rank_a  float32  [r, in]    with low_rank_b [out, r], a branch beside the product that takes the scaled input as
low_rank_b                      it is before the rotation (SVDQuant)

With R = blockdiag(H) the layer computes y = (x * pre_scale) @ R @ Q^T + ((x * pre_scale) @ a^T) @ b^T, so its effective
weight is (Q @ R + b @ a) * pre_scale. A backend's kernel sees none of it: QuantLinear applies it around the kernel, and
whoever wants the real weight takes `effective_weight`.

The regular Hadamard matrix of size 4^k is the k-fold Kronecker product of REGULAR with itself, over sqrt(4^k). It is
symmetric, its own inverse, and exact in bf16 (entries are plus or minus a power of 2); Sylvester's is another matrix.
Sources: ConvRot (comfy-kitchen, tensor/int8_utils.py) and Model Optimizer's SVDQuantLinear.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from wan_runtime.doubts import Refuse, at_once
from wan_runtime.formats import FORMATS, BadSlot, Slots

SLOTS = ("rotation", "pre_scale", "low_rank_a", "low_rank_b")
BESIDE = "input_scale"  # the one slot of a layer that is neither its weight's nor a correction
REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def effective_weight(weight_format: str, slots: Slots) -> torch.Tensor:
    """The weight that a layer stands for, fp32 [out, in]: dequantised, and every correction worked in.

    Raises BadSlot for a slot that neither the format nor this page knows: what is not understood is noise when ignored.
    """
    weight, corrections = split(weight_format, slots)
    value = FORMATS[weight_format].dequantize(weight)
    if "rotation" in corrections:
        value = rotate(value, group_of(corrections))
    if "low_rank_a" in corrections:
        value = value + corrections["low_rank_b"].float() @ corrections["low_rank_a"].float()
    if "pre_scale" in corrections:
        value = value * corrections["pre_scale"].float()
    return value


def split(weight_format: str, slots: Slots) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A layer's slots -> (those that its format reads, its corrections), without the input scale.

    Raises BadSlot for one that is neither.
    """
    known = FORMATS[weight_format].layout(1, 1)
    unknown = sorted(slots.keys() - known.keys() - {*SLOTS, BESIDE})
    if unknown:
        raise BadSlot(
            unknown[0],
            f"a {weight_format} layer has no slot {unknown[0]!r} (it has {', '.join(known)}; any layer may have "
            f"{', '.join(SLOTS)}); a slot that nothing reads would change the weight in silence.",
        )
    return {n: t for n, t in slots.items() if n in known}, {n: t for n, t in slots.items() if n in SLOTS}


def before(rows: torch.Tensor, corrections: Slots, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [tokens, in] -> (what the kernel multiplies, what the low-rank branch takes), in their dtype."""
    scaled = rows
    if "pre_scale" in corrections:
        scaled = (rows.float() * corrections["pre_scale"]).to(rows.dtype)
    return (scaled if group is None else rotate(scaled, group)), scaled


def after(product: torch.Tensor, scaled: torch.Tensor, corrections: Slots) -> torch.Tensor:
    """The kernel's product [tokens, out], with the low-rank branch added in fp32 where there is one."""
    if "low_rank_a" not in corrections:
        return product
    dtype = scaled.dtype
    down = torch.nn.functional.linear(scaled, corrections["low_rank_a"].to(dtype))
    return product.float() + torch.nn.functional.linear(down, corrections["low_rank_b"].to(dtype))


def group_of(slots: Slots) -> int | None:
    """The rotation's group size, or None. Reads the slot's value: not for a forward, which would wait for the GPU."""
    return int(slots["rotation"].item()) if "rotation" in slots else None


def rotate(rows: torch.Tensor, group: int | None) -> torch.Tensor:
    """[..., in] times the block-diagonal regular Hadamard matrix, in the rows' dtype; None leaves them as they are."""
    if group is None:
        return rows
    matrix = hadamard(group, rows.device, rows.dtype)
    return (rows.reshape(-1, group) @ matrix).reshape(rows.shape)


@functools.lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The regular Hadamard matrix [size, size] over sqrt(size); raises ValueError for a size that is no power of 4."""
    if not _power_of_4(size):
        raise ValueError(f"a regular Hadamard matrix has a power of 4 rows, not {size}.")
    with torch.inference_mode(False):  # it outlives the caller's mode
        unit = torch.tensor(REGULAR, dtype=torch.float32, device="cpu")
        matrix = torch.ones(1, 1, device="cpu")
        while matrix.shape[0] < size:
            matrix = torch.kron(matrix, unit)
        return torch.Tensor.to(matrix / size**0.5, device=device, dtype=dtype)


def _power_of_4(size: int) -> bool:
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1


def check(slots: Mapping[str, torch.Tensor], out: int, inp: int, refuse: Refuse = at_once) -> None:
    """Refuse corrections of a wrong dtype or shape, or with values that no producer writes; raises BadSlot.

    A rotation's group is read at once: it decides what is computed.
    """
    if ("low_rank_a" in slots) != ("low_rank_b" in slots):
        alone = "low_rank_a" if "low_rank_a" in slots else "low_rank_b"
        raise BadSlot(alone, f"{alone} is there without the other half of the low-rank branch.")
    rank = slots["low_rank_a"].shape[0] if "low_rank_a" in slots else 0
    wanted = {
        "rotation": (torch.int32, (1,)),
        "pre_scale": (torch.float32, (1, inp)),
        "low_rank_a": (torch.float32, (rank, inp)),
        "low_rank_b": (torch.float32, (out, rank)),
    }
    for name, (dtype, shape) in wanted.items():
        tensor = slots.get(name)
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise BadSlot(
                name, f"slot {name} needs {dtype} {list(shape)}; it is {tensor.dtype} {list(tensor.shape)}."
            )
        refuse(~torch.isfinite(tensor).all(), functools.partial(_not_finite, name))
    _check_values(slots, inp, refuse)


def _not_finite(name: str) -> BadSlot:
    return BadSlot(name, f"{name} holds NaN or infinite values; the file is damaged.")


def _check_values(slots: Mapping[str, torch.Tensor], inp: int, refuse: Refuse) -> None:
    group = group_of(slots)
    if group is not None and (not _power_of_4(group) or inp % group):
        raise BadSlot(
            "rotation",
            f"a rotation in groups of {group} does not fit: a group is a power of 4 that divides in_features {inp}.",
        )
    if "pre_scale" in slots:
        refuse(
            ~(slots["pre_scale"] > 0).all(),
            lambda: BadSlot(
                "pre_scale", "an input channel is scaled by zero or less; no quantiser writes that."
            ),
        )
