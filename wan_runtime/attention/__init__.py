"""Who computes attention: one file a kernel library. Each says by running it whether it serves on a device.

The order of `AUTOMATIC` is by what one H200 measured at WAN's shapes; torch's own choice on Hopper can be half as fast
as FlashAttention 3 (docs/log.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import BackendUnavailable

# (q [batch, queries, heads, head], k and v [batch, keys, heads, head], at any strides but a contiguous head)
# -> [batch, queries, heads, head] in q's dtype: softmax(q k^T / sqrt(head)) v, no mask.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Attention:
    """One implementation of attention.

    fits    device -> why it has nothing to win or cannot run there, from the device's kind alone, or None.
    attend  the function; it imports what it needs when called.
    codes   the same on e4m3 codes: (q, k, v, and the scale [batch, heads] fp32 of each), or None where it takes none.
    trains  whether a gradient flows through `attend`.
    """

    name: str
    fits: Callable[[torch.device], str | None]
    attend: Attend
    codes: Callable[..., torch.Tensor] | None = None
    trains: bool = True


@dataclass(frozen=True)
class Ends:
    """How much attends in bf16 under FP8 attention: so many blocks, and so many steps, at either end.

    One of each is caution: no end at all was no worse, but in a tiny model (docs/speed.md).
    """

    blocks: int = 1
    steps: int = 1


ENDS = Ends()
ATTENTIONS: Catalogue[Attention] = Catalogue("wan_runtime.attention", Attention)
AUTOMATIC = ("fa3", "cudnn", "sdpa")  # best first


@dataclass(frozen=True)
class Choice:
    """The attention chosen for a device, and why those before it were passed over."""

    name: str
    passed: dict[str, str]

    @property
    def attend(self) -> Attend:
        return ATTENTIONS[self.name].attend


def choose(wanted: str, device: torch.device, dtype: torch.dtype, head: int) -> Choice | None:
    """The attention for "auto" or a name; None leaves the host's own (auto, without a GPU).

    `head` is the size of one head. Raises BackendUnavailable for a name that cannot be served, with the reason.
    """
    if wanted == "auto" and device.type != "cuda":
        return None
    refusals: dict[str, str] = {}
    for name in AUTOMATIC if wanted == "auto" else (wanted,):
        refusal = refused(name, device, dtype, head)
        if refusal is None:
            return Choice(name, refusals)
        refusals[name] = refusal
    if wanted == "auto":  # not even SDPA runs: the host's own may know better
        return None
    raise BackendUnavailable(f"attention={wanted!r} on {device}", refusals)


def refused(name: str, device: torch.device, dtype: torch.dtype, head: int) -> str | None:
    """Why an attention cannot serve, found by running it once on a tiny input; None where it can."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        device = torch.device("cuda", index)
    return _probe(name, device, dtype, head)


@functools.cache
def _probe(name: str, device: torch.device, dtype: torch.dtype, head: int) -> str | None:
    attention = ATTENTIONS[name]
    unfit = attention.fits(device)
    if unfit is not None:
        return unfit
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = torch.randn(3, 1, 130, 2, head, generator=generator, device="cpu").to(device, dtype)
    try:
        result = attention.attend(q, k, v)
        finite = bool(torch.isfinite(result).all())
    except Exception as error:  # whatever the library says is the reason shown to the user
        said = str(error).strip().splitlines()
        return f"a test call failed: {type(error).__name__}: {(said[0] if said else '')[:200]}"
    if not finite:
        return "a test call gave NaN or infinity"
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    truth = (q @ k.transpose(2, 3) * head**-0.5).softmax(3) @ v
    wrong = float((result.double().transpose(1, 2) - truth).norm() / truth.norm())
    return None if wrong < 0.1 else f"a test call was wrong by {wrong:.2f} (relative error)"
