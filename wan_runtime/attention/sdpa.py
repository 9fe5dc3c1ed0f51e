"""torch's scaled_dot_product_attention, its own choice of kernel, on any device."""

from __future__ import annotations

import torch

from wan_runtime.attention import Attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


ATTENTION = Attention(name="sdpa", fits=lambda device: None, attend=attend)
