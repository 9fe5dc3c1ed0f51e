"""Who multiplies. A backend says which (format, compute) pairs it can serve on a device, or why not, by trying.

compute  how the product is formed: "fp8" (FP8 tensor cores, activations quantised a token), "nvfp4" and "mxfp8" (both
         operands in blocks, as the weight lies), "bf16" (the weight dequantised to the activation's dtype, then an
         ordinary product), "fp32" (the reference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.formats import Slots

# (activations [tokens, in], weight slots, static input scale [1, 1] or None) -> product [tokens, out] without bias,
# a fresh tensor in the activations' dtype or fp32.
Multiply = Callable[[torch.Tensor, Slots, torch.Tensor | None], torch.Tensor]

# As Multiply, with a bias [out] in the product's dtype that is added before the one rounding to it.
Biased = Callable[[torch.Tensor, Slots, torch.Tensor | None, torch.Tensor], torch.Tensor]


class Coded(Protocol):
    """(codes, their scale, weight slots, NVFP4's scale for all) -> product [tokens, out] without bias.

    The activations are as the compute's Rows hold them (wan_runtime.kernels._rows).
    """

    def __call__(
        self, codes: torch.Tensor, scale: torch.Tensor, slots: Slots, whole: torch.Tensor | None = None, /
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Added:
    """How a product of codes is added to what is there, where a GPU does that in the product itself.

    takes  into [tokens, out] -> whether that works there and saves time; nothing is asked of the device.
    add    (codes, their scale, weight slots, factor [out] fp32 or None for 1, into): into += factor * product, rounded
           once.
    """

    takes: Callable[[torch.Tensor], bool]
    add: Callable[[torch.Tensor, torch.Tensor, Slots, torch.Tensor | None, torch.Tensor], None]


def _no_codes(weight_format: str, compute: str) -> Coded | None:
    return None


def _not_added(weight_format: str, compute: str) -> Added | None:
    return None


def _no_bias(weight_format: str, compute: str) -> Biased | None:
    return None


def _no_remark(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One multiplier.

    computes  format -> the computes it offers, best first.
    refuses   (format, compute, device, (out, in)) -> why it cannot serve that layer there, or None. Decided by running
              a tiny multiplication on the device, not by a version table.
    kernel    (format, compute) -> the function that multiplies.
    coded     (format, compute) -> the function that multiplies activations which a fused kernel has quantised already,
              as wan_runtime.kernels._codes says for the compute, or None where the product takes none.
    added     (format, compute) -> how `coded`'s product is added to what is there, or None.
    biased    (format, compute) -> the function that multiplies bf16 activations and adds a bf16 bias in the same pass,
              or None. The bias of a file is fp32: a layer whose bias is exactly bf16 saves a pass over its output.
    remark    device -> what a user should read of the products there, a sentence, or None.
    per_channel  it multiplies FP8 weights with one scale an output channel. Where not, a file's that have them are
                 refused, and weights that are quantised for it get one scale a tensor.
    own_scales   computes whose activations it can only give scales of its own, where a file's input scale would count.
    """

    name: str
    computes: Callable[[str], tuple[str, ...]]
    refuses: Callable[[str, str, torch.device, tuple[int, int]], str | None]
    kernel: Callable[[str, str], Multiply]
    coded: Callable[[str, str], Coded | None] = _no_codes
    added: Callable[[str, str], Added | None] = _not_added
    biased: Callable[[str, str], Biased | None] = _no_bias
    remark: Callable[[torch.device], str | None] = _no_remark
    per_channel: bool = True
    own_scales: frozenset[str] = frozenset()


BACKENDS: Catalogue[Backend] = Catalogue("wan_runtime.backends", Backend)
AUTOMATIC = ("torch",)  # what backend="auto" may choose, best first; the reference is for checking
COMPUTES = ("fp8", "nvfp4", "mxfp8", "bf16", "fp32")


def backend_named(name: str) -> Backend:
    """The backend that users call `name`: torch, te, reference."""
    found = {record.name: record for record in (BACKENDS[module] for module in BACKENDS)}
    if name not in found:
        raise BackendUnavailable(
            f"backend={name!r}",
            {name: f"there is no such backend in this version (there are: {', '.join(found)})."},
        )
    return found[name]


def multiplier(backend: str, weight_format: str, compute: str) -> Multiply:
    """The function that multiplies for a layer."""
    return backend_named(backend).kernel(weight_format, compute)


def coded_multiplier(backend: str, weight_format: str, compute: str) -> Coded | None:
    """The function that multiplies codes for a layer, or None."""
    return backend_named(backend).coded(weight_format, compute)


def added_multiplier(backend: str, weight_format: str, compute: str) -> Added | None:
    """How a layer's product of codes is added to what is there, or None."""
    return backend_named(backend).added(weight_format, compute)


def biased_multiplier(backend: str, weight_format: str, compute: str) -> Biased | None:
    """The function that multiplies for a layer and adds its bf16 bias, or None."""
    return backend_named(backend).biased(weight_format, compute)


def device_named(name: str | torch.device | None) -> torch.device:
    """The device that a caller calls `name`, once something could be placed on it; None is the GPU if there is one.

    Raises InvalidOption for what is no device, or none that this machine and this torch have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # torch names devices that are not there, and complains at first use
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        said = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise InvalidOption(
            f"device {str(name)!r} cannot be used: {said}. Give cpu, cuda (the first GPU) or cuda:1, and see "
            "`wan-runtime doctor` for what this machine has."
        ) from error
    return device
