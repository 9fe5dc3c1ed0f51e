"""What a patched model gets beside its weights: an attention of this library's, and fused blocks."""

from __future__ import annotations

import torch
from torch import nn

from wan_runtime.attention import Choice, Ends, choose
from wan_runtime.errors import BackendUnavailable
from wan_runtime.kernels import refused
from wan_runtime.patches import Host


def attention_for(
    model: nn.Module, host: Host, wanted: str, device: torch.device, dtype: torch.dtype
) -> Choice | None:
    """The attention to use; None leaves the host's own."""
    why = _own_blocks(model, host)
    if host.blocks is None or why is not None:
        if wanted != "auto":
            raise BackendUnavailable(
                f"attention={wanted!r}",
                {wanted: f"the attention of a {host.name} model is its own{why or ''}."},
            )
        return None
    return choose(wanted, device, dtype, host.blocks.head(model))


def _own_blocks(model: nn.Module, host: Host) -> str | None:
    """Why a model of a host whose blocks this library knows keeps its own, in words, or None."""
    why = None if host.blocks is None else host.blocks.refuses(model)
    return None if why is None else f" here: {why}"


def accelerate(
    model: nn.Module,
    host: Host,
    attention: Choice | None,
    ends: Ends,
    fuse: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[bool, list[str]]:
    """Give a patched model its attention and its fused blocks: (whether fused, what its user should read)."""
    if host.blocks is None:
        return False, []
    said = []
    if attention is not None:
        said = [f"attention: {name} refused: {why}." for name, why in attention.passed.items()]
        said += host.blocks.attend(model, attention.name, (device.type, dtype), ends)
    if not fuse or device.type != "cuda":  # no news on a CPU, where only the host's own forward runs
        return False, said
    refusal = host.blocks.refuses(model) or refused(device)
    if refusal is None and attention is None:
        refusal = "they need one of this library's attentions, and none runs here"
    if refusal is not None:
        return False, [*said, f"The host's own block forward is used: fused kernels: {refusal}."]
    return True, [*said, *host.blocks.fuse(model)]
