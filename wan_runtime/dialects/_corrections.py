"""The keys of what a producer does around a product (see wan_runtime/corrections.py), beside any quantised layer.

key                 dtype, shape     meaning
X.pre_quant_scale   float [in]       the input is multiplied by it (AWQ, SmoothQuant; Model Optimizer, ComfyUI's NVFP4)
X.svdquant_lora_a   float [r, in]    with svdquant_lora_b [out, r], a branch beside the product that takes the scaled
X.svdquant_lora_b                    input (Model Optimizer's SVDQuant)
"""

from __future__ import annotations

import dataclasses

import torch

from wan_runtime.dialects import Layer, Source
from wan_runtime.errors import BadTensor
from wan_runtime.header import Header

SMOOTHED = "pre_quant_scale"
BRANCH = {"svdquant_lora_a": "low_rank_a", "svdquant_lora_b": "low_rank_b"}
SVD = frozenset(BRANCH)
KEYS = SVD | {SMOOTHED}


def smoothed(header: Header, layer: Layer) -> Layer:
    """The layer with its input's scale, where it has one."""
    key = f"{layer.module}.{SMOOTHED}"
    return _with(layer, [Source(key, "pre_scale", _input_row)] if key in header.entries else [])


def branched(header: Header, layer: Layer) -> Layer:
    """The layer with its low-rank branch, where it has one; raises BadTensor for half a branch."""
    keys = {f"{layer.module}.{leaf}": slot for leaf, slot in BRANCH.items()}
    found = [key for key in keys if key in header.entries]
    if len(found) == 1:
        [missing] = keys.keys() - {*found}
        raise BadTensor(header.path, found[0], f"it is half of a low-rank branch, and {missing} is missing.")
    return _with(layer, [Source(key, keys[key], _factor) for key in found])


def _with(layer: Layer, sources: list[Source]) -> Layer:
    return dataclasses.replace(layer, sources=(*layer.sources, *sources))


def _input_row(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """[in] or [1, in] -> fp32 [1, in]."""
    if tensor.numel() != inp:
        raise ValueError(
            f"a factor for each of {inp} input channels is needed; this has shape {list(tensor.shape)}."
        )
    return tensor.float().reshape(1, inp)


def _factor(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    if tensor.dim() != 2:
        raise ValueError(f"half of a low-rank branch is a matrix; this has shape {list(tensor.shape)}.")
    return tensor.float()
