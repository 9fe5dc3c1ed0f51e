"""What keeps any host's block from its fused forward now: a device, gradients, or something that holds a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from wan_runtime.autograd import gradient_wanted

from ._hooks import hooked


def obstacle(block: nn.Module, device: torch.device, kernels: str, parts: Iterable[nn.Module]) -> str | None:
    """Why a block on a device must take the host's forward, in words, or None; `parts` are those it would not call."""
    if kernels == "TRITON" and device.type != "cuda":
        return f"the fused kernels need a GPU and the block is on {device.type}"
    if gradient_wanted(block.parameters()):
        return "gradients are on"
    for part in parts:
        hook = hooked(part)
        if hook is not None:
            return f"{type(part).__name__} carries {hook}"
    return None


def traced(arguments: Iterable[Any]) -> str | None:
    """Why a call with these arguments must take the host's forward: a gradient is to flow through it."""
    if gradient_wanted(a for a in arguments if isinstance(a, torch.Tensor)):
        return "gradients are on"
    return None


def notes(
    blocks: Sequence[Any], why: Callable[[Any], str | None], leaves: Callable[[Any], list[nn.Module]]
) -> list[str]:
    """What a user reads of blocks that were just fused: those that cannot be yet, and leaves that are called."""
    whys = Counter(reason for block in blocks if (reason := why(block)) is not None)
    said = [
        f"{count} of {len(blocks)} blocks run the host's own forward: {why}."
        for why, count in sorted(whys.items())
    ]
    held = sum(_held(leaf) for block in blocks for leaf in leaves(block))
    if held:
        said.append(
            f"{held} Linears of the blocks are wrapped by an adapter or carry a hook: they are called as they are, and "
            "quantise their own input."
        )
    return said


def _held(linear: nn.Module) -> bool:
    return not isinstance(linear, nn.Linear) or hooked(linear) is not None
