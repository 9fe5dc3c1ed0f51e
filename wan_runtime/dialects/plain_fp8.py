"""Plain fp8 cast (G1): weights cast to e4m3fn or e5m2 with no scale anywhere; the scale is 1 by construction.

Comfy-Org's and Kijai's `*_fp8_e4m3fn` / `*_fp8_e5m2` files. Kijai keeps norms, embeddings, head and biases in the base
dtype; Comfy's own also cast biases and norms, which are upcast on reading. e5m2 is never recast to e4m3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys
from wan_runtime.formats import check_cast
from wan_runtime.header import Header

ANY_RANK = 8  # everything in the file was cast, whatever its shape


def detect(header: Header) -> Evidence | None:
    kinds = {entry.dtype for entry in header.entries.values()}
    scaled = any(_keys.is_scale(key) for key in header.entries)  # the marker scaled_fp8 counts too
    if scaled or not kinds & set(_keys.FP8) or not kinds <= {*_keys.FLOAT, *_keys.FP8}:
        return None
    return Evidence(True, "there are fp8 weights and no scale in the whole file")


def _ones(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """A plain cast has no scale tensor: its scale is exactly 1, and is read off the weight's own key."""
    return torch.ones(1, 1, device="cpu")


def read(header: Header) -> Reading:
    layers = {}
    for key, entry in header.entries.items():
        if entry.dtype in _keys.FP8 and _keys.is_linear_weight(key, entry):
            # Codes that fill fp8's range were scaled, and the scales were lost on the way.
            sources = (Source(key, "payload", _keys.code_slot, check_cast), Source(key, "scale", _ones))
            path = _keys.module(key)
            layers[path] = Layer(path, _keys.FP8[entry.dtype], (entry.shape[0], entry.shape[1]), sources)
    return _keys.reading(header, layers, fp8_rank=ANY_RANK)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("plain fp8 files are read, not written: a cast without scales loses precision")


DIALECT = Dialect(
    name="plain_fp8",
    row="G1",
    meaning="weights cast to fp8 without scales",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=lambda layers: Marks(),
)
