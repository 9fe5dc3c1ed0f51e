"""LightX2V (D1 to D7): the converter's files under the original names, without a file marker.

key                   dtype, shape                          meaning
X.weight              F8_E4M3 or I8 [out, in]               codes of FP8, int8
                      U8 [out, in / 2]                      NVFP4, MXFP4; the EVEN element in the LOW nibble
                      U8 [out, 3 * in / 4]                  MXFP6 (E3M2)
                      U8 [out, in]                          MXFP8: the bytes are E4M3 codes
X.weight_scale        F32 [out, 1], [] or [1]               FP8, int8: W = code * weight_scale
                      F32 [up(out / 128), up(in / 128)]     FP8, int8 in blocks of 128 x 128
                      F8_E4M3 [up128(out), up4(in / 16)]    NVFP4 block scales, SWIZZLED in 128 x 4 tiles
                      F8_E8M0 [up128(out), up4(in / 32)]    MX block scales, SWIZZLED; the padding is not initialised
X.weight_global_scale F32 []                                NVFP4 as converted: 2688 / amax, it DIVIDES
X.alpha               F32 []                                NVFP4 as released: 1 / (weight_global_scale *
X.input_global_scale  F32 []                                input_global_scale), beside 2688 / activation amax
X.input_scale         F32 [], optional                      FP8, int8 a tensor: activation amax / 448, / 127

NVFP4: W = E2M1[code] * weight_scale * (alpha * input_global_scale) = E2M1[code] * weight_scale / weight_global_scale,
and the static input scale is 1 / input_global_scale.

FP8 and int8 with a float `weight_scale` carry no mark and need none: it multiplies for every producer, whose readings
are the same. Files with scales a row or a block, and int8, are read here, FP8 with one scale a tensor by `modelopt`.
Source: LightX2V, tools/convert/quant/quant.py, tools/convert/add_scale_to_models.py,
lightx2v/common/ops/mm/mm_weight.py and lightx2v_kernel/csrc/gemm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys, _scaled, _swizzle
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.formats import check_scale
from wan_runtime.header import DTYPES, Entry, Header

GLOBAL_SCALES = ("alpha", "input_global_scale", "weight_global_scale")
# Keys of producers that share `weight_scale` but mean something else by it.
FOREIGN = {*_keys.MEANINGFUL, "weight_scale_2", "pre_quant_scale", "weight_scalar"} - {"alpha"}
# MX: bytes of a row of 32 weights.
ROW_BYTES = {"mxfp8": 32, "mxfp6": 24, "mxfp4": 16}
NEARBY = 64  # how many numbers next to the input scale are tried; it moves by 2^-17 of itself at most
AGREE = 1e-5  # alpha is the rounded product of what it is made of


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if "weight_scale" not in names or names & FOREIGN:
        return None
    given = [name for name in GLOBAL_SCALES if name in names]
    weights = {k: e for k, e in header.entries.items() if _keys.is_linear_weight(k, e)}
    scales = {k: header.entries[f"{k}_scale"] for k in weights if f"{k}_scale" in header.entries}
    if given and any(weights[k].dtype == "U8" and scales[k].dtype == "F8_E4M3" for k in scales):
        return Evidence(True, f"packed weights with .weight_scale and .{', .'.join(given)}")
    if any(weights[k].dtype == "U8" and scales[k].dtype == "F8_E8M0" for k in scales):
        return Evidence(True, "U8 weights with E8M0 block scales")
    if any(weights[k].dtype == "I8" and scales[k].dtype in _keys.FLOAT for k in scales):
        return Evidence(False, "int8 with .weight_scale, which multiplies for every producer")
    if _scaled.has_wide_scales(header):
        return Evidence(False, "FP8 with .weight_scale a row or a block, which multiplies for every producer")
    return None


def read(header: Header) -> Reading:
    mx = _mx_format(header)
    layers = {}
    for key, entry in header.entries.items():
        path = _keys.module(key)
        if not _keys.is_linear_weight(key, entry):
            continue
        if entry.dtype in _scaled.FORMATS:
            layers[path] = _scaled.layer(header, path)
        elif entry.dtype == "U8":
            scale = header.entries.get(f"{key}_scale")
            if scale is None:
                raise BadTensor(header.path, key, f"it is packed and {key}_scale is missing.")
            packed = _nvfp4_layer if scale.dtype == "F8_E4M3" else _mx_layer
            layers[path] = packed(header, path, entry, mx)
    return _keys.reading(header, layers)


def _mx_format(header: Header) -> str:
    """The one MX format whose packing fits the sizes of every layer, "" where the file has none.

    The bytes of a row do not say how many weights they are. The number of block scales does, but for rounding, and so
    do the other tensors: a Linear of a block takes as many features as some norm or bias has.
    """
    widths = {entry.shape[0] for entry in header.entries.values() if len(entry.shape) == 1}
    fitting = set(ROW_BYTES)
    for key, entry in header.entries.items():
        scale = header.entries.get(f"{key}_scale")
        if entry.dtype == "U8" and scale is not None and scale.dtype == "F8_E8M0":
            fitting &= {name for name in ROW_BYTES if _fits(entry, scale, name, widths)}
            if not fitting:
                raise BadTensor(
                    header.path,
                    f"{key}_scale",
                    f"{list(scale.shape)} block scales beside {list(entry.shape)} bytes of codes are neither MXFP8, "
                    "MXFP6 nor MXFP4 of a size that this model has, or the file mixes them.",
                )
    if 1 < len(fitting) < len(ROW_BYTES):
        raise CheckpointError(
            header.path,
            f"{' and '.join(sorted(fitting))} fit the sizes of all its packed weights alike; no key says which it is.",
        )
    return fitting.pop() if len(fitting) == 1 else ""


def _fits(weight: Entry, scale: Entry, name: str, widths: set[int]) -> bool:
    if len(weight.shape) != 2 or weight.shape[1] % ROW_BYTES[name]:
        return False
    blocks = weight.shape[1] // ROW_BYTES[name]
    return blocks * 32 in widths and scale.shape == _swizzle.padded(weight.shape[0], blocks)


def _mx_layer(header: Header, path: str, entry: Entry, mx: str) -> Layer:
    key = f"{path}.weight"
    scale = header.entries[f"{key}_scale"]
    if scale.dtype != "F8_E8M0" or not mx:
        raise BadTensor(
            header.path,
            f"{key}_scale",
            f"beside U8 codes it must be F8_E4M3 (NVFP4) or F8_E8M0 (MX); it is {scale.dtype} {list(scale.shape)}.",
        )
    sources = (
        Source(key, "payload", _keys.code_slot),
        Source(f"{key}_scale", "block_scale", _mx_scales),
    )
    shape = (entry.shape[0], entry.shape[1] // ROW_BYTES[mx] * 32)
    return Layer(path, mx, shape, sources)


def _nvfp4_layer(header: Header, path: str, entry: Entry, mx: str) -> Layer:
    key = f"{path}.weight"
    given = {name: f"{path}.{name}" for name in GLOBAL_SCALES if f"{path}.{name}" in header.entries}
    whole = {"alpha", "input_global_scale"} <= given.keys()
    if not whole and ("weight_global_scale" not in given or "alpha" in given):
        raise BadTensor(
            header.path,
            key,
            "it is packed NVFP4 and its global scale is missing: .weight_global_scale, or .alpha with "
            f".input_global_scale. It has {', '.join(given) or 'none of them'}.",
        )
    sources = [
        Source(key, "payload", _keys.code_slot),
        Source(f"{key}_scale", "block_scale", _nvfp4_scales),
        *(Source(given[name], name, _factor) for name in given),
    ]
    if "input_global_scale" in given:
        sources.append(Source(given["input_global_scale"], "input_scale", _reciprocal))
    return Layer(path, "nvfp4", (entry.shape[0], entry.shape[1] * 2), tuple(sources), _one_scale)


def _one_scale(given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """What divides, or what alpha and the activations' scale were made of -> the one scale that multiplies."""
    slots = {name: tensor for name, tensor in given.items() if name not in GLOBAL_SCALES}
    made = given["alpha"] * given["input_global_scale"] if "alpha" in given else None
    slots["scale"] = 1 / given["weight_global_scale"] if made is None else made
    if made is not None and "weight_global_scale" in given:
        product = (made * given["weight_global_scale"]).item()
        if not abs(product - 1) < AGREE:
            raise ValueError(
                f"its global scales disagree: alpha * input_global_scale is {made.item():g}, and that times "
                f"weight_global_scale is {product:g}, not 1. Keys of two files were mixed."
            )
    return slots


def _factor(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    scale = _keys.scalar_slot(tensor, out, inp)
    check_scale({"scale": scale}, "scale")
    if not scale.item():
        raise ValueError("this global scale is zero; every weight would vanish, or be infinite.")
    return scale


def _reciprocal(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return 1 / _factor(tensor, out, inp)


def _nvfp4_scales(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return _swizzle.unswizzle(tensor.view(torch.uint8), out, inp // 16)


def _mx_scales(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return _swizzle.unswizzle(tensor.view(torch.uint8), out, inp // 32)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the converter stores a layer: FP8 and int8 with a scale a row; NVFP4 as released where its static input scale
    is known, else as converted."""
    if weight_format in ROW_BYTES:
        scales = _swizzle.swizzle(slots["block_scale"]).view(torch.float8_e8m0fnu)
        return {"weight": slots["payload"], "weight_scale": scales}
    if weight_format == "nvfp4":
        scales = _swizzle.swizzle(slots["block_scale"]).view(torch.float8_e4m3fn)
        return {"weight": slots["payload"], "weight_scale": scales, **_global_scales(slots)}
    scale, out = slots["scale"], slots["payload"].shape[0]
    if scale.numel() == 1 and not weight_format.endswith(
        "_block"
    ):  # the same scale for every row is the same weight
        scale = scale.reshape(1, 1).expand(out, 1).contiguous()
    encoded = {"weight": slots["payload"].view(DTYPES[_scaled.CODES[weight_format]]), "weight_scale": scale}
    if "input_scale" in slots:
        encoded["input_scale"] = slots["input_scale"].reshape(())
    return encoded


def _global_scales(slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """alpha and input_global_scale whose product in fp32 is the scale to the bit, or weight_global_scale."""
    scale = slots["scale"].reshape(())
    if "input_scale" not in slots:
        return {"weight_global_scale": 1 / scale}
    # The quotient by a rounded number often misses the scale by a bit; the numbers next to it seldom all do.
    nearby = 1 + torch.arange(NEARBY, device=scale.device) * 2.0**-23
    inputs = (1 / slots["input_scale"]).reshape(1) * nearby
    alphas = scale / inputs
    best = (alphas * inputs - scale).abs().argmin().reshape(1)
    return {
        "alpha": alphas.gather(0, best).reshape(()),
        "input_global_scale": inputs.gather(0, best).reshape(()),
    }


def marks(layers: Mapping[str, str]) -> Marks:
    held = set(layers.values())
    layout = {"nibble": "even low"} if held & {"nvfp4", "mxfp4"} else {}
    return Marks(layout=layout | ({"block scales": "swizzled"} if held & {"nvfp4", *ROW_BYTES} else {}))


DIALECT = Dialect(
    name="lightx2v",
    row="D1-D7",
    meaning="LightX2V: NVFP4 with the even element in the low nibble, swizzled scales, a global scale that divides",
    detect=detect,
    read=read,
    targets={"lightx2v-fp8": "fp8", "lightx2v-nvfp4": "nvfp4"},
    encode=encode,
    marks=marks,
    per_channel={"lightx2v-fp8": "always"},
)
