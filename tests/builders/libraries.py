"""Writers of the dialects whose producers are libraries: compressed-tensors, quanto and torchao."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import torch

from tests.builders import files
from tests.builders.codes import E2M1, E3M2, E4M3, E5M2, Bytes, Floats, nearest, pack, tile_order
from tests.builders.files import Content, codes_as

TABLES = {"fp8": E4M3, "fp8_e5m2": E5M2}
DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
Named = tuple[dict[str, torch.Tensor], Floats]


def _floats(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def _layers(state: dict[str, torch.Tensor], modules: list[str]) -> dict[str, Floats]:
    return {module: state[f"{module}.weight"].double().numpy() for module in modules}


def _grouped(
    weight: Floats, kind: str, group: int, rounded: Any = np.float32
) -> tuple[Bytes, Floats, Floats]:
    """One-byte codes with a scale for each `group` weights of a row: codes, scales [out, in / group], the weight."""
    out, inp = weight.shape
    top = 127 if kind == "int8" else np.nanmax(TABLES[kind][np.isfinite(TABLES[kind])])
    blocks = weight.reshape(out, inp // group, group)
    scale = rounded(np.abs(blocks).max(axis=2) / top).astype(np.float64)
    if kind == "int8":
        codes, meant = files.int8(blocks, scale[..., None])
    else:
        codes = nearest(blocks / scale[..., None], TABLES[kind])
        meant = TABLES[kind][codes] * scale[..., None]
    return codes.reshape(out, inp), scale, meant.reshape(out, inp)


def _bf16(values: Floats) -> Floats:
    return torch.from_numpy(values).bfloat16().double().numpy()


def _int4(weight: Floats, group: int) -> tuple[Bytes, Floats, Floats]:
    """4-bit codes plus 8, scales a group, and the weight they mean."""
    out, inp = weight.shape
    blocks = weight.reshape(out, inp // group, group)
    scale = (np.abs(blocks).max(axis=2) / 7).astype(np.float32).astype(np.float64)
    codes = np.rint(blocks / scale[..., None]).clip(-8, 7)
    meant = (codes * scale[..., None]).reshape(out, inp)
    return (codes + 8).reshape(out, inp).astype(np.uint8), scale, meant


def compressed_tensors(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """H1, H2: config.json says the method; the key names of each kind of weight; a global scale that divides."""
    config = {
        "_class_name": "WanTransformer3DModel",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "transform_config": {},
            "sparsity_config": {},
        },
    }
    content = Content(dict(state), config=config)
    for module, weight in _layers(state, modules).items():
        new, content.weights[module] = _compressed(weight, weight_format)
        if "weight_packed" in new:
            del content.tensors[f"{module}.weight"]
        content.tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in new.items()}
    return content


def _compressed(weight: Floats, weight_format: str) -> Named:
    if weight_format == "nvfp4":
        codes, block_codes, total, meant = files.nvfp4(weight)
        divisor = float(np.float32(1 / total))
        return {
            "weight_packed": codes_as(pack(codes, even_high=False)),
            "weight_scale": codes_as(block_codes, torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([divisor]),
        }, meant / total / divisor
    if weight_format in ("mxfp4", "mxfp8"):
        codes, byte, meant = files.mx(weight, E2M1 if weight_format == "mxfp4" else E4M3)
        if weight_format == "mxfp4":
            return {
                "weight_packed": codes_as(pack(codes, even_high=False)),
                "weight_scale": codes_as(byte),
            }, meant
        return {"weight": codes_as(codes, torch.float8_e4m3fn), "weight_scale": codes_as(byte)}, meant
    if weight_format == "int4":
        return _compressed_int4(weight)
    kind = weight_format.removesuffix("_block")
    codes, scale, meant = _grouped(weight, kind, 64 if weight_format.endswith("_block") else weight.shape[1])
    return {"weight": codes_as(codes, DTYPES[kind]), "weight_scale": _floats(scale)}, meant


def _compressed_int4(weight: Floats) -> Named:
    codes, scale, meant = _int4(weight, 32)
    return {
        "weight_packed": torch.from_numpy(pack(codes, even_high=False).view("<i4")),
        "weight_scale": _floats(scale),
        "weight_shape": torch.tensor(weight.shape),
    }, meant


def quanto(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """E1: bf16 scales a row, placeholders for the activations' scales, the map in the header."""
    name = {"int8": "qint8", "fp8": "qfloat8", "fp8_e5m2": "qfloat8_e5m2"}[weight_format]
    fields = json.dumps({module: {"weights": name, "activations": "none"} for module in modules})
    marks = {
        "quantization_format": "quanto",
        "quantization_map_base64": base64.b64encode(fields.encode()).decode(),
    }
    content = Content(dict(state), metadata=marks)
    for module, weight in _layers(state, modules).items():
        codes, scale, content.weights[module] = _grouped(weight, weight_format, weight.shape[1], _bf16)
        del content.tensors[f"{module}.weight"]
        content.tensors |= {
            f"{module}.weight._data": codes_as(codes, DTYPES[weight_format]),
            f"{module}.weight._scale": _floats(scale).bfloat16(),
            f"{module}.input_scale": torch.ones((), dtype=torch.bfloat16),
            f"{module}.output_scale": torch.ones((), dtype=torch.bfloat16),
        }
    return content


ELEMENTS = {"mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn_x2"}


def torchao(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """I1: one record a tensor in the header; block scales plain for NVFP4 and MXFP4, in tile order for the other MX."""
    content = Content(dict(state))
    records: dict[str, Any] = {name: {"_type": "Tensor"} for name in state}
    for module, weight in _layers(state, modules).items():
        record, new, content.weights[module] = _torchao(weight, weight_format)
        del content.tensors[f"{module}.weight"]
        content.tensors |= {f"{module}._weight_{part}": tensor for part, tensor in new.items()}
        records[f"{module}.weight"] = {**record, "_tensor_data_names": list(new)}
    content.metadata = {name: json.dumps(record) for name, record in records.items()}
    content.metadata["tensor_names"] = json.dumps(list(records))
    return content


def _torchao(weight: Floats, weight_format: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Floats]:
    if weight_format == "nvfp4":
        codes, block_codes, total, meant = files.nvfp4(weight)
        parts = {
            "qdata": codes_as(pack(codes, even_high=False)),
            "scale": codes_as(block_codes, torch.float8_e4m3fn),
            "per_tensor_scale": torch.tensor(total),
        }
        return (
            {"_type": "NVFP4Tensor", "_data": {"block_size": 16, "is_swizzled_scales": False}},
            parts,
            meant,
        )
    if weight_format.startswith("mx"):
        return _torchao_mx(weight, weight_format)
    kind = weight_format.removesuffix("_block")
    group = 64 if weight_format.endswith("_block") else weight.shape[1]
    codes, scale, meant = _grouped(weight, kind, group)
    parts = {"qdata": codes_as(codes, DTYPES[kind]), "scale": _floats(scale)}
    if kind == "int8":
        parts["zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
    return (
        {"_type": "Int8Tensor" if kind == "int8" else "Float8Tensor", "_data": {"block_size": [1, group]}},
        parts,
        meant,
    )


def _torchao_mx(weight: Floats, weight_format: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Floats]:
    table = {"mxfp8": E4M3, "mxfp6": E3M2, "mxfp4": E2M1}[weight_format]
    codes, byte, meant = files.mx(weight, table)
    swizzled = weight_format != "mxfp4"
    name = ELEMENTS.get(weight_format)
    scale = byte
    if swizzled:
        tiled = tile_order(byte)
        scale = tiled.reshape(tiled.shape[0] // 4, tiled.shape[1] * 4)
    data = {
        "block_size": 32,
        "elem_dtype": "fp6_e3m2" if name is None else {"_type": "torch.dtype", "_data": name},
        "is_swizzled_scales": swizzled,
    }
    if weight_format == "mxfp4":
        qdata = codes_as(pack(codes, even_high=False))
    else:
        qdata = codes_as(codes, torch.float8_e4m3fn if weight_format == "mxfp8" else torch.uint8)
    parts = {"qdata": qdata, "scale": codes_as(scale, torch.float8_e8m0fnu)}
    return {"_type": "MXTensor", "_data": data}, parts, meant


WRITERS: dict[str, tuple[files.Writer, tuple[str, ...]]] = {
    "compressed_tensors": (
        compressed_tensors,
        ("fp8", "fp8_block", "int8", "int8_block", "int4", "nvfp4", "mxfp8", "mxfp4"),
    ),
    "quanto": (quanto, ("int8", "fp8", "fp8_e5m2")),
    "torchao": (
        torchao,
        ("fp8", "fp8_e5m2", "fp8_block", "int8", "int8_block", "nvfp4", "mxfp8", "mxfp6", "mxfp4"),
    ),
}
