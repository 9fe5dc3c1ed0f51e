"""One quantised layer of Model Optimizer's export, by its dtypes and by what config.json says its algorithm is.

Dtypes and shapes decide what they can. What they cannot, config.json's `quant_algo` does (with MIXED_PRECISION, the
layer's own in `quantized_layers`): whether block scales in bytes are MX ones in plain order, and whether NVFP4's blocks
have 16 weights or, for W4A8_NVFP4_FP8, 32. With --dialect and no config.json, the caller's word stands for the order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from wan_runtime.dialects import Layer, Source, _keys, _scaled
from wan_runtime.errors import BadTensor
from wan_runtime.header import Entry, Header

MX = {"mxfp8": ("MXFP8",), "mxfp4": ("MXFP4", "W4A8_MXFP4_FP8")}
WIDE = "W4A8_NVFP4_FP8"
WIDE_BLOCK = 32


def algorithm(header: Header, path: str) -> str | None:
    """The layer's quant_algo in capitals, "" where config.json names none for it, None where there is no config."""
    config = header.config.get("quantization_config")
    if not isinstance(config, Mapping):
        return None
    if config.get("quant_algo") == "MIXED_PRECISION":
        layers = config.get("quantized_layers")
        config = layers.get(path, {}) if isinstance(layers, Mapping) else {}
    return str(config.get("quant_algo", "")).upper() if isinstance(config, Mapping) else ""


def layer(header: Header, path: str, block_scale: Source) -> Layer | None:
    """The layer, or None for a weight that is not quantised. `block_scale` reads NVFP4's scales of 16 weights.

    Raises BadTensor where its parts do not fit, or are of an algorithm that is not read.
    """
    entry = header.entries[f"{path}.weight"]
    scale = header.entries.get(f"{path}.weight_scale")
    if entry.dtype == "F8_E4M3" and scale is not None and scale.dtype == "U8":
        return _mx_layer(header, path, "mxfp8", 1)
    if entry.dtype in (*_keys.FP8, "I8"):
        four = scale is not None and len(scale.shape) == 4 and entry.dtype in _keys.FP8
        return _four_sided(header, path) if four else _scaled.layer(header, path)
    if entry.dtype != "U8":
        return None
    if scale is not None and scale.dtype == "U8":
        return _mx_layer(header, path, "mxfp4", 2)
    if scale is not None and scale.dtype in _keys.FLOAT:
        raise BadTensor(
            header.path,
            f"{path}.weight",
            f"{entry.dtype} codes with float scales are INT4 ({algorithm(header, path) or 'AWQ'}), which is not read. "
            "Export the model as NVFP4 or FP8, or convert the original bf16 file.",
        )
    return _nvfp4_layer(header, path, block_scale)


def _mx_layer(header: Header, path: str, name: str, packed: int) -> Layer:
    """`packed` codes lie in a byte."""
    key, said = f"{path}.weight", algorithm(header, path)
    entry, scale = header.entries[key], header.entries[f"{key}_scale"]
    if said is not None and said not in MX[name]:
        raise BadTensor(
            header.path,
            f"{key}_scale",
            f"these scales are bytes, as {name.upper()} has them, and config.json says {said or 'nothing'} here.",
        )
    shape = (entry.shape[0], entry.shape[1] * packed)
    wanted = (shape[0], shape[1] // 32)
    if scale.shape != wanted:
        raise BadTensor(
            header.path,
            f"{key}_scale",
            f"plain {name.upper()} scales of {list(shape)} weights are {list(wanted)}; these are {list(scale.shape)}.",
        )
    sources = (
        Source(key, "payload", _keys.code_slot),
        Source(f"{key}_scale", "block_scale", _keys.code_slot),
    )
    return Layer(path, name, shape, sources)


def _nvfp4_layer(header: Header, path: str, block_scale: Source) -> Layer:
    wide = algorithm(header, path) == WIDE
    if wide:
        block_scale = dataclasses.replace(block_scale, decode=_wide_scales)
    payload = Source(f"{path}.weight", "payload", _keys.code_slot)
    found = _keys.nvfp4_layer(header, path, payload, block_scale)
    if not wide:
        return found
    # Its activations are FP8: their scale is amax / 448 where NVFP4's is amax / 2688.
    sources = (
        dataclasses.replace(s, decode=_as_nvfp4) if s.slot == "input_scale" else s for s in found.sources
    )
    return dataclasses.replace(found, sources=tuple(sources))


def _wide_scales(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """A scale for 32 weights is the scale of each of the two blocks of 16 in it."""
    if tuple(tensor.shape) == (out, inp // 16):
        return tensor.view(torch.uint8)
    if inp % WIDE_BLOCK or tuple(tensor.shape) != (out, inp // WIDE_BLOCK):
        raise ValueError(
            f"{WIDE} has a scale for each {WIDE_BLOCK} weights, [{out}, {inp / WIDE_BLOCK:g}] for this layer; the file "
            f"has {list(tensor.shape)}."
        )
    return tensor.view(torch.uint8).repeat_interleave(2, 1)


def _as_nvfp4(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return _keys.scalar_slot(tensor, out, inp) / 6


def _four_sided(header: Header, path: str) -> Layer:
    """FP8 in blocks: the scales keep the sides that were reduced, [out / 128, 1, in / 128, 1]."""
    key = f"{path}.weight"
    entry, scale = header.entries[key], header.entries[f"{key}_scale"]
    if scale.dtype not in _keys.FLOAT or scale.shape[1] != 1 or scale.shape[3] != 1:
        raise BadTensor(header.path, f"{key}_scale", _blocks_wanted(scale))
    rows, cols = scale.shape[0], scale.shape[2]
    decode = Source(f"{key}_scale", "scale", lambda tensor, out, inp: tensor.float().reshape(rows, cols))
    sources = (Source(key, "payload", _keys.code_slot), decode)
    return Layer(path, f"{_keys.FP8[entry.dtype]}_block", (entry.shape[0], entry.shape[1]), sources)


def _blocks_wanted(scale: Entry) -> str:
    return f"the scales of FP8 blocks are floats [rows, 1, columns, 1]; these are {scale.dtype} {list(scale.shape)}."
