"""Writers of each dialect, by the tables of docs/formats.md: the tensors, and the weights they mean in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.builders.codes import (
    E2M1,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    INT8,
    Bytes,
    Floats,
    nearest,
    pack,
    pack6,
    tile_order,
)

TABLES = {"fp8": E4M3, "fp8_e5m2": E5M2}
DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
MARKS = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "nvfp4": "nvfp4"}


@dataclass
class Content:
    """A file to be: its tensors and metadata, a config.json to lie beside it, and the fp64 weight of each layer."""

    tensors: dict[str, torch.Tensor]
    weights: dict[str, Floats] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    def write(self, folder: Path, name: str = "model.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in self.tensors.items()}, path, self.metadata
        )
        if self.config is not None:
            (folder / "config.json").write_text(json.dumps(self.config))
        return path


def codes_as(codes: Bytes, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(codes)).view(dtype)


def fp8(weight: Floats, weight_format: str, *, per_row: bool = False) -> tuple[Bytes, Floats, Floats]:
    """Codes, the fp32-rounded scale and the weight they mean."""
    table = TABLES[weight_format]
    amax = np.abs(weight).max(axis=1, keepdims=True) if per_row else np.abs(weight).max().reshape(1, 1)
    scale = (amax / np.nanmax(table[np.isfinite(table)])).astype(np.float32).astype(np.float64)
    codes = nearest(weight / scale, table)
    return codes, scale, table[codes] * scale


def nvfp4(weight: Floats) -> tuple[Bytes, Bytes, float, Floats]:
    """E2M1 codes [out, in], E4M3 block scales [out, in / 16], the fp32-rounded global scale, the weight they mean."""
    out, inp = weight.shape
    scale = float(np.float32(np.abs(weight).max() / (6 * 448)))
    blocks = weight.reshape(out, inp // 16, 16)
    block_codes = nearest(np.abs(blocks).max(axis=2) / 6 / scale, E4M3)
    step = (E4M3[block_codes] * scale)[..., None]
    codes = nearest(blocks / step, E2M1)
    return codes.reshape(out, inp), block_codes, scale, (E2M1[codes] * step).reshape(out, inp)


def int8(weight: Floats, scale: Floats) -> tuple[Bytes, Floats]:
    """int8 codes, their bytes, under scales that broadcast; and the weight they mean."""
    codes = np.clip(np.rint(weight / scale), -128, 127).astype(np.int8).view(np.uint8)
    return codes, INT8[codes] * scale


def block_scales(weight: Floats, side: int, top: float) -> tuple[Floats, Floats]:
    """amax / top of each side x side block, fp32-rounded: as a file holds them, and one a weight."""
    out, inp = weight.shape
    scale = np.empty((-(-out // side), -(-inp // side)))
    for row in range(scale.shape[0]):
        for col in range(scale.shape[1]):
            block = weight[row * side : (row + 1) * side, col * side : (col + 1) * side]
            scale[row, col] = np.float32(np.abs(block).max() / top)
    return scale, scale[np.arange(out)[:, None] // side, np.arange(inp)[None] // side]


def mx(weight: Floats, table: Floats) -> tuple[Bytes, Bytes, Floats]:
    """Codes [out, in], E8M0 block scales [out, in / 32] that hold each block, and the weight they mean."""
    out, inp = weight.shape
    blocks = weight.reshape(out, inp // 32, 32)
    top = np.nanmax(table[np.isfinite(table)])
    byte = (np.ceil(np.log2(np.abs(blocks).max(axis=2) / top)) + 127).astype(np.uint8)
    step = E8M0[byte][..., None]
    codes = nearest(blocks / step, table)
    return codes.reshape(out, inp), byte, (table[codes] * step).reshape(out, inp)


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _layers(state: dict[str, torch.Tensor], modules: list[str]) -> dict[str, Floats]:
    return {module: state[f"{module}.weight"].double().numpy() for module in modules}


def plain(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """Unquantised: as given, or in bf16 with its Linears among the weights."""
    if weight_format != "bf16":
        return Content(dict(state))
    tensors = {key: tensor.bfloat16() for key, tensor in state.items()}
    return Content(tensors, {module: tensors[f"{module}.weight"].double().numpy() for module in modules})


def plain_fp8(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """G1: a cast without a scale."""
    content = Content(dict(state))
    for module, weight in _layers(state, modules).items():
        codes = nearest(weight, TABLES[weight_format])
        content.tensors[f"{module}.weight"] = codes_as(codes, DTYPES[weight_format])
        content.weights[module] = TABLES[weight_format][codes]
    return content


def comfy_scaled_fp8(
    state: dict[str, torch.Tensor], modules: list[str], weight_format: str, *, per_row: bool = False
) -> Content:
    """A1: `.scale_weight` of one element, or one a row; a marker with two elements."""
    content = Content({**state, "scaled_fp8": torch.zeros(2, dtype=DTYPES[weight_format])})
    for module, weight in _layers(state, modules).items():
        codes, scale, meant = fp8(weight, weight_format, per_row=per_row)
        content.tensors[f"{module}.weight"] = codes_as(codes, DTYPES[weight_format])
        content.tensors[f"{module}.scale_weight"] = torch.from_numpy(scale).float().reshape(-1, 1)[:, 0]
        if per_row:
            content.tensors[f"{module}.scale_weight"] = torch.from_numpy(scale).float()
        content.weights[module] = meant
    return content


def comfy(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """B1, B2: a JSON record a layer; NVFP4 even-high with block scales in tile order."""
    content = Content(dict(state))
    for module, weight in _layers(state, modules).items():
        record = json.dumps({"format": MARKS[weight_format]}).encode()
        if weight_format == "nvfp4":
            codes, block_codes, scale, content.weights[module] = nvfp4(weight)
            new = {
                "weight": codes_as(pack(codes, even_high=True)),
                "weight_scale": codes_as(tile_order(block_codes), torch.float8_e4m3fn),
                "weight_scale_2": _scalar(scale),
            }
        else:
            new = _plain_scaled(content, module, weight, weight_format)
        new["comfy_quant"] = torch.tensor(list(record), dtype=torch.uint8)
        content.tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in new.items()}
    return content


ALGORITHMS = {
    "fp8": "FP8",
    "int8": "W8A8_SQ_PER_CHANNEL",
    "mxfp4": "mxfp4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}


def modelopt(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """C1, C2, C4: 4-bit codes even-low, block scales plain; config.json says who wrote it."""
    quantization = {"quant_method": "modelopt", "quant_algo": ALGORITHMS[weight_format]}
    config = {"_class_name": "WanTransformer3DModel", "quantization_config": quantization}
    content = Content(dict(state), config=config)
    for module, weight in _layers(state, modules).items():
        if weight_format == "nvfp4":
            codes, block_codes, scale, content.weights[module] = nvfp4(weight)
            new = {
                "weight": codes_as(pack(codes, even_high=False)),
                "weight_scale": codes_as(block_codes, torch.float8_e4m3fn),
                "weight_scale_2": _scalar(scale),
            }
        elif weight_format in MX:
            codes, block_codes, content.weights[module] = mx(weight, MX[weight_format])
            eight = weight_format == "mxfp8"
            held = codes_as(codes, DTYPES["fp8"]) if eight else codes_as(pack(codes, even_high=False))
            new = {"weight": held, "weight_scale": codes_as(block_codes)}
        elif weight_format == "int8":
            scale_of = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float32).astype(np.float64)
            codes, content.weights[module] = int8(weight, scale_of)
            new = {
                "weight": codes_as(codes, torch.int8),
                "weight_scale": torch.from_numpy(scale_of[:, 0]).float(),
            }
        else:
            new = _plain_scaled(content, module, weight, weight_format)
        content.tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in new.items()}
    return content


MX = {"mxfp8": E4M3, "mxfp6": E3M2, "mxfp4": E2M1}


def lightx2v(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """D1, D3 to D7: scales a row or a 128 x 128 block; NVFP4 as released, even-low; block scales in tile order."""
    content = Content(dict(state))
    for module, weight in _layers(state, modules).items():
        if weight_format in MX:
            new, content.weights[module] = _lightx2v_mx(weight, weight_format)
        elif weight_format == "nvfp4":
            codes, block_codes, scale, meant = nvfp4(weight)
            inputs, alpha = 512.0, float(np.float32(1 / (512 * np.float64(np.float32(1 / scale)))))
            new = {
                "weight": codes_as(pack(codes, even_high=False)),
                "weight_scale": codes_as(tile_order(block_codes), torch.float8_e4m3fn),
                "alpha": _scalar(alpha),
                "input_global_scale": _scalar(inputs),
            }
            content.weights[module] = meant / scale * (alpha * inputs)
        else:
            new, content.weights[module] = _lightx2v_scaled(weight, weight_format)
        content.tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in new.items()}
    return content


def _lightx2v_mx(weight: Floats, weight_format: str) -> tuple[dict[str, torch.Tensor], Floats]:
    codes, byte, meant = mx(weight, MX[weight_format])
    if weight_format != "mxfp8":
        codes = pack6(codes) if weight_format == "mxfp6" else pack(codes, even_high=False)
    scales = codes_as(tile_order(byte), torch.float8_e8m0fnu)
    return {"weight": codes_as(codes), "weight_scale": scales}, meant


def _lightx2v_scaled(weight: Floats, weight_format: str) -> tuple[dict[str, torch.Tensor], Floats]:
    whole = weight_format.startswith("int8")
    top = 127 if whole else 448
    if weight_format.endswith("_block"):
        scale, each = block_scales(weight, 128, top)
    else:
        scale = (np.abs(weight).max(axis=1, keepdims=True) / top).astype(np.float32).astype(np.float64)
        each = scale
    if whole:
        codes, meant = int8(weight, each)
    else:
        codes = nearest(weight / each, E4M3)
        meant = E4M3[codes] * each
    dtype = torch.int8 if whole else torch.float8_e4m3fn
    return {"weight": codes_as(codes, dtype), "weight_scale": torch.from_numpy(scale).float()}, meant


def turbodiffusion(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """F1: int8 by amax / 128 of each 128 x 128 block, saturating, and the patch embedding flattened to a Linear."""
    content = Content(dict(state))
    for module, weight in _layers(state, modules).items():
        scale, each = block_scales(weight, 128, 128)
        codes, content.weights[module] = int8(weight, each)
        del content.tensors[f"{module}.weight"]
        content.tensors[f"{module}.int8_weight"] = codes_as(codes, torch.int8)
        content.tensors[f"{module}.scale"] = torch.from_numpy(scale).float()
    patch = next(key for key in state if key.endswith("patch_embedding.weight"))
    content.tensors[patch] = state[patch].flatten(1)
    return content


def modelopt_comfy(state: dict[str, torch.Tensor], modules: list[str], weight_format: str) -> Content:
    """C5: as `modelopt`, even-low, with block scales in tile order; the header has its quantization_config."""
    content = modelopt(state, modules, weight_format)
    for module in modules:
        key = f"{module}.weight_scale"
        scales = content.tensors[key].view(torch.uint8).numpy()
        content.tensors[key] = codes_as(tile_order(scales), torch.float8_e4m3fn)
    content.metadata["quantization_config"] = json.dumps({"quant_algo": "NVFP4"})
    return content


def _plain_scaled(
    content: Content, module: str, weight: Floats, weight_format: str
) -> dict[str, torch.Tensor]:
    codes, scale, content.weights[module] = fp8(weight, weight_format)
    return {
        "weight": codes_as(codes, DTYPES[weight_format]),
        "weight_scale": _scalar(float(scale[0, 0])),
    }


Writer = Callable[[dict[str, torch.Tensor], list[str], str], Content]
# dialect -> its writer and the formats it is tried in; a dialect that is missing here fails its own test.
WRITERS: dict[str, tuple[Writer, tuple[str, ...]]] = {
    "comfy": (comfy, ("fp8", "fp8_e5m2", "nvfp4")),
    "comfy_scaled_fp8": (comfy_scaled_fp8, ("fp8", "fp8_e5m2")),
    "lightx2v": (
        lightx2v,
        ("fp8", "fp8_block", "int8", "int8_block", "nvfp4", "mxfp8", "mxfp6", "mxfp4"),
    ),
    "modelopt": (modelopt, ("fp8", "int8", "nvfp4", "mxfp8", "mxfp4")),
    "modelopt_comfy": (modelopt_comfy, ("nvfp4",)),
    "plain": (plain, ("none",)),
    "plain_fp8": (plain_fp8, ("fp8", "fp8_e5m2")),
    "turbodiffusion": (turbodiffusion, ("int8_block",)),
}


def input_scale_leaf(dialect: str, weight_format: str) -> str | None:
    """The optional key of a layer's static input scale, which multiplies; None where a producer has no such key."""
    if weight_format in MX or (dialect, weight_format) == ("lightx2v", "nvfp4"):
        return (
            None  # MX scales activations dynamically; its NVFP4 has the reciprocal, and cannot do without it
        )
    return "scale_input" if dialect == "comfy_scaled_fp8" else "input_scale"


def payload_leaf(dialect: str, weight_format: str) -> str:
    """The key of a layer's codes."""
    packed = dialect == "compressed_tensors" and weight_format in ("nvfp4", "mxfp4", "int4")
    names = {"turbodiffusion": "int8_weight", "quanto": "weight._data", "torchao": "_weight_qdata"}
    return "weight_packed" if packed else names.get(dialect, "weight")


def float_scale_leaf(dialect: str, weight_format: str) -> str | None:
    """The key of a layer's fp32 scale (of the tensor, where there are two); None where only powers of two scale it."""
    if weight_format in MX:
        return None
    if weight_format == "nvfp4":
        names = {
            "lightx2v": "alpha",
            "compressed_tensors": "weight_global_scale",
            "torchao": "_weight_per_tensor_scale",
        }
        return names.get(dialect, "weight_scale_2")
    names = {
        "comfy_scaled_fp8": "scale_weight",
        "turbodiffusion": "scale",
        "quanto": "weight._scale",
        "torchao": "_weight_scale",
    }
    return names.get(dialect, "weight_scale")
