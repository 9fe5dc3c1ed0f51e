"""How often torch has seen a tensor written, by which what was made of it is known to be stale."""

from __future__ import annotations

import torch


def writes(tensor: torch.Tensor | None) -> int:
    """torch's count; it keeps none for tensors made in inference mode, nor of writes through `.data`."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
