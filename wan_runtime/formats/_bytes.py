"""The numbers that float8 bytes mean, on any device: where there is no float8 (Apple), by a table of 256."""

from __future__ import annotations

import functools

import torch

FLOAT8_DEVICES = ("cpu", "cuda", "meta")


def numbers(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 codes of a one-byte dtype (float8 or int8) -> fp32 of the same shape."""
    if codes.device.type in FLOAT8_DEVICES:
        return codes.view(dtype).float()
    return _table(dtype, codes.device).index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Byte -> its number, fp32 [256]."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float().to(device)
