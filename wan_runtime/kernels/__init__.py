"""Triton kernels: one fused operation a file, each beside its plain-torch twin. Importing a kernel file loads Triton,
so backends import them inside the functions that run them."""

from __future__ import annotations

import importlib.util

import torch


def refused(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on a device, or None."""
    if device.type != "cuda":
        return f"they need a GPU, and the model is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA builds for Linux)"
    return None
