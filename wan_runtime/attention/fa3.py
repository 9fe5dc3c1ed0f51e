"""FlashAttention 3, from the PyPI package `fa3-fwd` (Hopper, bf16): the fastest bf16 attention on an H100 or H200."""

from __future__ import annotations

import importlib.util

import torch

from wan_runtime.attention import Attention

MODULE = "fa3_fwd_interface"


def fits(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention 3 needs a Hopper GPU; the model is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"FlashAttention 3 needs a Hopper GPU; this one has compute capability {major}.{minor}"
    if importlib.util.find_spec(MODULE) is None:
        return "it is not installed (pip install fa3-fwd)"
    return None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func

    result = flash_attn_func(q, k, v)
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


ATTENTION = Attention(name="fa3", fits=fits, attend=attend, trains=False)  # the wheel has no backward pass
