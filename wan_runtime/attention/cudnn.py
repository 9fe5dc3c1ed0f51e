"""cuDNN's attention through torch: no extra package, Hopper and later."""

from __future__ import annotations

import torch

from wan_runtime.attention import Attention


def fits(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"cuDNN's attention needs a GPU; the model is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"cuDNN's attention is no faster than torch's own before Hopper (this is {major}.{minor})"
    return None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


ATTENTION = Attention(name="cudnn", fits=fits, attend=attend)
