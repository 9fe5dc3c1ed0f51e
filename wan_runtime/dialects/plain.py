"""Unquantised: bf16, fp16 or fp32 tensors and nothing else (the original release, diffusers, `convert --to bf16`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wan_runtime.dialects import Dialect, Evidence, Marks, Reading, _keys
from wan_runtime.header import Header


def detect(header: Header) -> Evidence | None:
    kinds = {entry.dtype for entry in header.entries.values()}
    if not kinds or not kinds <= set(_keys.FLOAT) or any(_keys.is_scale(key) for key in header.entries):
        return None
    return Evidence(True, f"every tensor is {' or '.join(sorted(kinds))} and none is a scale")


def read(header: Header) -> Reading:
    return _keys.reading(header, {}, fp8_rank=0)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("a plain file holds no quantised layer")


DIALECT = Dialect(
    name="plain",
    row="-",
    meaning="unquantised bf16, fp16 or fp32",
    detect=detect,
    read=read,
    targets={"bf16": "bf16"},
    encode=encode,
    marks=lambda layers: Marks(),
)
