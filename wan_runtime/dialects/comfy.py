"""Comfy quantised tensors (B1 to B11): a JSON record a layer says its format.

key                 dtype, shape                               meaning
X.comfy_quant       U8 [n]                                     UTF-8 JSON, {"format": ...}; or in the header
X.weight            F8_E4M3 / F8_E5M2 [out, in]                FP8 codes (B1, B8, B9); MXFP8's (B3, B11)
                    I8 [out, in]                               int8 (B4, B10)
                    U8 [out, in / 2]                           NVFP4 (B2); the EVEN element in the HIGH nibble
                    I8 [out, in / 2]                           4-bit integers (B5 to B7): see _comfy_int4.py
X.weight_scale      F32 () or [out] or [out, 1] or blocks      FP8, int8: W = code * weight_scale
                    F8_E4M3 [up128(out), up4(in / 16)]         NVFP4 block scales, SWIZZLED in 128 x 4 tiles
                    U8 or F8_E8M0 [up128(out), up4(in / 32)]   MXFP8 block scales, SWIZZLED: 2^(byte - 127)
X.weight_scale_2    F32 ()                                     NVFP4: W = E2M1[code] * weight_scale * weight_scale_2
X.pre_quant_scale   [in], optional                             NVFP4: the input is multiplied by it
X.weight_scalar     F32 ()                                     hybrid_mxfp8: for GPUs without MXFP8; not multiplied
X.input_scale       F32 (), optional                           activation amax / 448 (FP8) or / 2688 (NVFP4)

A record's `convrot` says that W is what the codes mean times a block-diagonal regular Hadamard matrix. An unknown key
in a record raises: a rotation that is not undone is noise. Weights may be padded to multiples of 16 (NVFP4) or 32
(MXFP8). Source: ComfyUI's QUANTIZATION.md, comfy-kitchen, and convert_to_quant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from wan_runtime.dialects import (
    Dialect,
    Evidence,
    Layer,
    Marks,
    Reading,
    _comfy_layers,
    _comfy_records,
    _corrections,
    _keys,
    _swizzle,
)
from wan_runtime.errors import BadTensor
from wan_runtime.header import Header

NAMES = {
    "fp8": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8_tensorwise",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
}
PADS = {"nvfp4": 16, "mxfp8": 32}


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if _keys.postprocessed(header):
        return None
    if _comfy_records.TENSOR in names:
        return Evidence(True, "each quantised layer has a comfy_quant record")
    if _comfy_records.HEADER_KEY in header.metadata:
        return Evidence(True, f"the header has {_comfy_records.HEADER_KEY}")
    if "weight_scale_2" in names and not names & _corrections.SVD:
        return Evidence(False, _keys.UNMARKED)
    return None


def read(header: Header) -> Reading:
    records = _comfy_records.records(header)
    if not records:  # named by the caller: an NVFP4 file that lost its records
        records = {
            _keys.module(k): {"format": "nvfp4"} for k in header.entries if _keys.leaf(k) == "weight_scale_2"
        }
    layers = {path: _comfy_layers.layer(header, path, record) for path, record in records.items()}
    markers = tuple(key for key in header.entries if _keys.leaf(key) == _comfy_records.TENSOR)
    _refuse_unmarked(header, layers)
    return _keys.reading(header, layers, markers)


def _refuse_unmarked(header: Header, layers: Mapping[str, Layer]) -> None:
    """A layer without a record is loaded as it is by Comfy: an fp8 or packed one would then be noise."""
    for key, entry in header.entries.items():
        if (
            _keys.is_linear_weight(key, entry)
            and _keys.module(key) not in layers
            and entry.dtype in (*_keys.FP8, "U8", "I8")
        ):
            raise BadTensor(
                header.path,
                key,
                f"it is {entry.dtype} and has no comfy_quant record while {len(layers)} layers have.",
            )


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one layer; rows are padded as comfy-kitchen pads them, and the record then says the real shape."""
    record: dict[str, object] = {"format": NAMES[weight_format]}
    payload = slots["payload"]
    padded = _padded(payload, PADS.get(weight_format, 1))
    if padded.shape != payload.shape:
        columns = payload.shape[1] * (2 if weight_format == "nvfp4" else 1)
        record["orig_shape"] = [payload.shape[0], columns]
    if weight_format == "nvfp4":
        encoded = {
            **_keys.encode(weight_format, slots),
            "weight": _comfy_layers.swap_nibbles(padded),
            "weight_scale": _swizzle.swizzle(slots["block_scale"]).view(torch.float8_e4m3fn),
        }
    elif weight_format == "mxfp8":
        scales = _swizzle.swizzle(slots["block_scale"])
        encoded = {"weight": padded.view(torch.float8_e4m3fn), "weight_scale": scales}
    elif weight_format == "int8":
        scale = slots["scale"]
        encoded = {
            "weight": payload.view(torch.int8),
            "weight_scale": scale.reshape(()) if scale.numel() == 1 else scale,
        }
    else:
        encoded = _keys.encode(weight_format, slots)
    text = json.dumps(record).encode()
    return {"comfy_quant": torch.tensor(list(text), dtype=torch.uint8, device="cpu"), **encoded}


def _padded(payload: torch.Tensor, multiple: int) -> torch.Tensor:
    """The payload with zero rows up to a multiple."""
    missing = -payload.shape[0] % multiple
    return torch.nn.functional.pad(payload, (0, 0, 0, missing)) if missing else payload


def marks(layers: Mapping[str, str]) -> Marks:
    held = set(layers.values())
    layout = {"nibble": "even high"} if "nvfp4" in held else {}
    return Marks(layout={**layout, "block scales": "swizzled"} if held & PADS.keys() else layout)


DIALECT = Dialect(
    name="comfy",
    row="B1-B11",
    meaning="ComfyUI: NVFP4 with the even element in the high nibble and swizzled block scales",
    detect=detect,
    read=read,
    targets={"comfy-fp8": "fp8", "comfy-nvfp4": "nvfp4", "mxfp8": "mxfp8"},
    encode=encode,
    marks=marks,
)
