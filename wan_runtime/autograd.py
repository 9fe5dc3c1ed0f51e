"""What torch's autograd knows of tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def gradient_wanted(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a gradient is to flow back into any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def writes(tensor: torch.Tensor | None) -> int:
    """How often torch has seen a tensor written, by which what was made of it is known to be stale; it keeps no count
    for tensors made in inference mode, nor of writes through `.data`."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
