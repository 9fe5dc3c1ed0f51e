"""A fused block whose last pass makes the next block's first norm, where that will be given what this one gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import _fused
from ._modulation import rows_of
from ._shared import Modulation, Shared
from ._stream import Following


@dataclass(frozen=True)
class Entrance:
    """How a block begins: its own modulation [1, 6, width], its self-attention and its first norm's epsilon."""

    own: torch.Tensor
    self_attention: _fused.SelfAttention
    eps: float


@dataclass(frozen=True)
class Place:
    """A block's number among those of its model. `entrance` says how another one begins, or None where that is not
    fused."""

    number: int
    entrance: Callable[[nn.Module], Entrance | None]


def run(
    shared: Shared,
    place: Place | None,
    parts: _fused.Block,
    stream: torch.Tensor,
    steps: torch.Tensor,
    own: torch.Tensor,
    table: torch.Tensor | None,
    context: list[_fused.KeysValues],
    kernels: Any,
) -> torch.Tensor:
    """`_fused.forward` of a block, given what the block before it has made, and making the same for the next.

    place is None where torch.compile traces: there are no identities to tell a stream by, and each number would have a
    graph of its own. steps and own are what `_modulation.rows_of` takes; the rest is `_fused.forward`'s.
    """
    batch, tokens, _ = stream.shape
    # In inference mode there are no versions.
    if place is None or torch.is_inference_mode_enabled() or stream.is_inference():
        modulation, index = rows_of(own, steps, batch, tokens, shared)
        return _fused.forward(parts, stream, modulation, index, table, context, kernels)[0]
    carried = shared.take(place.number, stream, steps)
    modulation, index = rows_of(own, steps, batch, tokens, shared) if carried is None else carried.modulation
    begun = None if carried is None else carried.begun
    entrance = _following(shared, place, stream)
    following = after = None
    if entrance is not None:
        after = rows_of(entrance.own, steps, batch, tokens, shared)
        following = _first_norm(entrance, after)
    result, next_begun = _fused.forward(
        parts, stream, modulation, index, table, context, kernels, begun=begun, following=following
    )
    if after is not None and next_begun is not None:
        shared.carry(place.number + 1, result, steps, after, next_begun)
    return result


def _following(shared: Shared, place: Place, stream: torch.Tensor) -> Entrance | None:
    """How the next block begins, where it is on the fused forward and here."""
    block = shared.blocks.get(place.number + 1)
    entrance = None if block is None or _brought(block) else place.entrance(block)
    return None if entrance is None or entrance.own.device != stream.device else entrance


def _brought(block: nn.Module) -> bool:
    """Whether diffusers' group offloading brings a block's tensors: until its turn they may be on their way."""
    registry = block.__dict__.get("_diffusers_hook")
    return registry is not None and registry.get_hook("group_offloading") is not None


def _first_norm(entrance: Entrance, made: Modulation) -> Following:
    """A block's first norm under its modulation."""
    from wan_runtime.kernels import norm_modulate

    modulation, index = made
    norm1 = norm_modulate.Modulation(modulation[:, 1], modulation[:, 0], entrance.eps, index=index)
    return Following(norm1, _fused.coded_input(entrance.self_attention))
