"""Scaled FP8 under `scale_weight` (A1, A2): Comfy-Org's and Kijai's older Wan files, and musubi-tuner's.

key                     dtype, shape                     meaning
X.weight                F8_E4M3 or F8_E5M2 [out, in]     codes
                        I8 [out, in]                     LightX2V's ComfyUI mode, under the marker of FP8
X.scale_weight          F32 () or [1] or [out, 1]        W = code * scale_weight
                        F32 [out, in / g, 1]             musubi-tuner: a scale for g weights of a row, g 64 or 16
                        F32 [out / g, in / g]            convert_to_quant: a scale a g x g block
X.scale_weight_tensor   F32 (), optional                 musubi-tuner: multiplies scale_weight
X.scale_input           F32 (), optional                 activation amax / 448: x_q = x / s, y *= s
scaled_fp8              fp8 or F32, [0], [1] or [2]      file marker, may carry the file's prefix; 2 elements: the host
                                                         should dequantise and not multiply in fp8. Its dtype is not
                                                         trusted: the weight's own dtype decides.

A file may hold scale_weight = 1 beside an unquantised weight. Some recipes write no marker and scale = amax, with
codes in -1..1: the same product.
Source: ComfyUI, convert_old_quants; musubi-tuner, modules/fp8_optimization_utils.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys, _scaled
from wan_runtime.errors import BadTensor
from wan_runtime.header import DTYPES, Header

MARKER = "scaled_fp8"
SECOND = "scale_weight_tensor"


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if "scale_weight" not in names and MARKER not in names:
        return None
    marker = f"the {MARKER!r} marker" if MARKER in names else f"no {MARKER!r} marker"
    return Evidence(True, f"FP8 weights with .scale_weight, {marker}")


def read(header: Header) -> Reading:
    layers, markers = {}, [key for key in header.entries if _keys.leaf(key) == MARKER]
    for key, entry in header.entries.items():
        path = _keys.module(key)
        if not _keys.is_linear_weight(key, entry):
            continue
        if entry.dtype in _scaled.FORMATS:
            layers[path] = _layer(header, path)
        elif f"{path}.scale_weight" in header.entries:
            markers += _dummy_scales(header, path, entry.dtype)
    return _keys.reading(header, layers, tuple(markers))


def _layer(header: Header, path: str) -> Layer:
    layer = _scaled.layer(header, path, scale_leaf="scale_weight", input_leaf="scale_input")
    key = f"{path}.{SECOND}"
    if key not in header.entries:
        return layer
    sources = (*layer.sources, Source(key, "second", _keys.scalar_slot))
    return dataclasses.replace(layer, sources=sources, finish=_product)


def _product(given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """musubi-tuner's two levels of scales -> their product."""
    second = given["second"]
    if not bool(torch.isfinite(second) & (second > 0)):
        raise ValueError(
            f"its {SECOND} is {second.item():g}; a scale is positive and finite. The file is damaged."
        )
    rest = {name: tensor for name, tensor in given.items() if name != "second"}
    return {**rest, "scale": given["scale"] * second}


def _dummy_scales(header: Header, path: str, dtype: str) -> list[str]:
    """The scale keys beside an unquantised weight; they must be the dummy 1.0 that converters leave there."""
    key = f"{path}.scale_weight"
    values = header.read_tensor(key).float().flatten().tolist()
    if not values or any(value != 1 for value in values):
        raise BadTensor(
            header.path, key, f"its weight is {dtype}, not fp8, and the scale is {values[:3]}, not 1."
        )
    return [k for k in (key, f"{path}.scale_input") if k in header.entries]


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    encoded = {
        "weight": slots["payload"].view(DTYPES[_keys.CODES[weight_format]]),
        # [1], or [out, 1]: readers broadcast it against the weight.
        "scale_weight": slots["scale"] if slots["scale"].numel() > 1 else slots["scale"].reshape(1),
    }
    if "input_scale" in slots:
        encoded["scale_input"] = slots["input_scale"].reshape(())
    return encoded


def marks(layers: Mapping[str, str]) -> Marks:
    # Two elements: Comfy then dequantises, which is right for activations that were never calibrated.
    return Marks(tensors={MARKER: torch.zeros(2, dtype=torch.float8_e4m3fn, device="cpu")})


DIALECT = Dialect(
    name="comfy_scaled_fp8",
    row="A1, A2",
    meaning="FP8 with .scale_weight, which multiplies",
    detect=detect,
    read=read,
    targets={"comfy-fp8-scaled": "fp8"},
    encode=encode,
    marks=marks,
    per_channel={"comfy-fp8-scaled": "asked"},
)
