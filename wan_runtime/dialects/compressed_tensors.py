"""compressed-tensors, the format of llm-compressor and vLLM (H1, H2), usually a diffusers folder with a config.json.

key                    dtype, shape                 meaning
X.weight_packed        U8 [out, in / 2]             NVFP4 or MXFP4; the EVEN element in the LOW nibble
                       I32 [out, in * bits / 32]    4 or 8 bit integers plus 8 or 128, little-endian, EVEN element LOW
X.weight_shape         I64 [2]                      (out, in) of an I32 weight
X.weight               F8_E4M3 or I8 [out, in]      codes
X.weight_scale         F8_E4M3 [out, in / 16]       NVFP4 block scales, PLAIN row-major
                       U8 [out, in / 32]            MXFP4, MXFP8: W = code * 2^(byte - 127)
                       float (), [1], [out, 1] or   W = code * weight_scale
                       a block or group [R, C]
X.weight_zero_point    I32 [out / 8, in / group]    asymmetric 4 bit: W = (q - zero) * scale, packed along `out`
X.weight_global_scale  F32 [1]                      NVFP4: DIVIDES, W = E2M1[code] * weight_scale / weight_global_scale
X.input_global_scale   F32 [1], optional            NVFP4: 2688 / activation amax, the reciprocal of an input scale
X.input_scale          F32 [1], optional            activation amax / 448 or / 127

The marks are the leaf `weight_packed` and quant_method compressed-tensors in config.json; without either, an FP8 layer
with a multiplying `weight_scale` is the same file as others write. Its MXFP6 is E2M3, which no format here is: refused.
Source: compressed-tensors, compressors/ (nvfp4, mxfp4, mxfp8, pack_quantized, naive_quantized).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header

METHOD = "compressed-tensors"


def detect(header: Header) -> Evidence | None:
    if _config(header).get("quant_method") == METHOD:
        return Evidence(True, f"config.json says {METHOD} ({_config(header).get('format', 'no format')})")
    if "weight_packed" in _keys.leaves(header):
        return Evidence(True, f"weights are under .weight_packed, as {METHOD} alone has them")
    return None


def read(header: Header) -> Reading:
    _refuse_config(header)
    layers, markers = {}, []
    for key, entry in header.entries.items():
        path, leaf = _keys.module(key), _keys.leaf(key)
        if leaf == "weight_packed" and entry.dtype == "I32":
            layers[path], shape = _integers(header, path)
            markers.append(shape)
        elif leaf == "weight_packed":
            layers[path] = _packed_float(header, path)
        elif _keys.is_linear_weight(key, entry) and entry.dtype in ("F8_E4M3", "I8"):
            layers[path] = _bytes(header, path)
    return _keys.reading(header, layers, tuple(markers))


def _config(header: Header) -> Mapping[str, Any]:
    config = header.config.get("quantization_config")
    return config if isinstance(config, Mapping) else {}


def _refuse_config(header: Header) -> None:
    """What the configuration asks for beside the keys: transforms of the activations, and sparse weights."""
    transforms = _config(header).get("transform_config")
    sparse = _config(header).get("sparsity_config")
    for name, value in (("transform_config", transforms), ("sparsity_config", sparse)):
        if value:
            raise CheckpointError(
                header.path,
                f"config.json's {name} is {str(value)[:120]}, which is not read; a layer that misses it is noise. "
                "Quantise without it, or convert the original bf16 file with `wan-runtime convert`.",
            )


def _needed(header: Header, path: str, leaf: str) -> str:
    key = f"{path}.{leaf}"
    if key not in header.entries:
        raise BadTensor(header.path, f"{path}.weight", f"the layer is quantised and its {leaf} is missing.")
    return key


def _packed_float(header: Header, path: str) -> Layer:
    """NVFP4 or MXFP4, told apart by the dtype of the block scales."""
    key = f"{path}.weight_packed"
    packed, scale_key = header.entries[key], _needed(header, path, "weight_scale")
    scale = header.entries[scale_key]
    if packed.dtype != "U8" or len(packed.shape) != 2 or len(scale.shape) != 2:
        raise BadTensor(
            header.path, key, f"it is {packed.dtype} {list(packed.shape)}, not U8 or I32 of two dimensions."
        )
    shape = (packed.shape[0], packed.shape[1] * 2)
    payload = Source(key, "payload", _keys.code_slot)
    block_scale = Source(scale_key, "block_scale", _keys.code_slot)
    if scale.dtype == "F8_E4M3":
        sources = [
            payload,
            block_scale,
            Source(_needed(header, path, "weight_global_scale"), "scale", _reciprocal),
        ]
        if f"{path}.input_global_scale" in header.entries:
            sources.append(Source(f"{path}.input_global_scale", "input_scale", _reciprocal))
        return Layer(path, "nvfp4", shape, tuple(sources))
    if scale.dtype in ("U8", "F8_E8M0") and packed.shape[1] == scale.shape[1] * 16:
        return Layer(path, "mxfp4", shape, (payload, block_scale))
    raise BadTensor(
        header.path,
        key,
        f"it is U8 {list(packed.shape)} with {scale.dtype} scales {list(scale.shape)}, neither NVFP4 nor MXFP4. This "
        "library's MXFP6 is E2M3, which is not read; use its NVFP4, MXFP4, MXFP8 or FP8.",
    )


def _bytes(header: Header, path: str) -> Layer:
    """FP8, MXFP8 or int8 codes, one a byte."""
    key = f"{path}.weight"
    entry, scale_key = header.entries[key], _needed(header, path, "weight_scale")
    scale, out, inp = header.entries[scale_key], entry.shape[0], entry.shape[1]
    payload = Source(key, "payload", _keys.code_slot)
    if scale.dtype in ("U8", "F8_E8M0") and entry.dtype == "F8_E4M3":
        return Layer(path, "mxfp8", (out, inp), (payload, Source(scale_key, "block_scale", _keys.code_slot)))
    kind = "fp8" if entry.dtype == "F8_E4M3" else "int8"
    return Layer(
        path,
        *_scaled(header, scale_key, kind, (out, inp)),
        (payload, _scale(header, scale_key), *_static(header, path)),
    )


def _scaled(header: Header, key: str, kind: str, shape: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The format of one-byte codes by their scales: one a tensor or an output channel, or one a block."""
    scale = header.entries[key]
    plain = scale.numel == 1 or scale.shape in ((shape[0],), (shape[0], 1))
    return (kind if plain else f"{kind}_block"), shape


def _scale(header: Header, key: str) -> Source:
    entry = header.entries[key]
    if entry.dtype not in _keys.FLOAT:
        raise BadTensor(header.path, key, f"this scale must be a float; it is {entry.dtype}.")
    return Source(key, "scale", _float_scale)


def _float_scale(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    return tensor.float() if tensor.dim() == 2 else tensor.float().reshape(-1, 1)


def _static(header: Header, path: str) -> list[Source]:
    key = f"{path}.input_scale"
    return [Source(key, "input_scale", _keys.scalar_slot)] if key in header.entries else []


def _reciprocal(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """A scale that divides -> one that multiplies, fp32 [1, 1]."""
    scale = _keys.scalar_slot(tensor, out, inp)
    value = float(scale)
    if not math.isfinite(value):
        raise ValueError("the scale is NaN or infinite; the file is damaged or was never calibrated.")
    if value <= 0:
        raise ValueError(
            f"the scale divides and is {'zero' if value == 0 else f'negative ({value:g})'}; the file is damaged."
        )
    return 1 / scale


def _integers(header: Header, path: str) -> tuple[Layer, str]:
    """4 or 8 bit integers packed in I32 words: the layer, and the key that says its shape."""
    key, shape_key = f"{path}.weight_packed", _needed(header, path, "weight_shape")
    entry, stated = header.entries[key], header.read_tensor(shape_key).flatten().tolist()
    bits = entry.shape[-1] * 32 // stated[1] if len(stated) == 2 and stated[1] > 0 else 0
    if bits not in (4, 8) or list(entry.shape) != [stated[0], stated[1] * bits // 32]:
        raise BadTensor(
            header.path,
            key,
            f"it is I32 {list(entry.shape)} for a weight of {stated}: not 4 or 8 bits a weight, which are read. Use "
            "another bit width, or convert the original bf16 file with `wan-runtime convert`.",
        )
    shape, scale_key = (stated[0], stated[1]), _needed(header, path, "weight_scale")
    scale = _scale(header, scale_key)
    if bits == 8:  # a zero point is left over, and so refused
        payload = Source(key, "payload", _signed_bytes)
        return Layer(path, *_scaled(header, scale_key, "int8", shape), (payload, scale)), shape_key
    sources = [Source(key, "payload", _words), scale]
    zero = f"{path}.weight_zero_point"
    if zero in header.entries:
        sources.append(Source(zero, "zero", _zero_points))
    else:
        sources.append(
            Source(
                scale_key, "zero", lambda tensor, out, inp: torch.zeros_like(_float_scale(tensor, out, inp))
            )
        )
    return Layer(path, "int4", shape, tuple(sources), _offset), shape_key


def _words(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """I32 words -> their bytes, the lowest first."""
    return tensor.contiguous().view(torch.uint8)


def _signed_bytes(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Codes plus 128 -> two's complement."""
    return _words(tensor, out, inp) ^ 0x80


def _zero_points(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Zero points plus 8, eight rows in a word [ceil(out / 8), groups] -> fp32 [out, groups], minus 8."""
    if tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.shape[0] != -(-out // 8):
        raise ValueError(
            f"packed zero points of {out} rows are I32 [{-(-out // 8)}, groups]; these are {list(tensor.shape)}."
        )
    packed = _words(tensor.T, out, inp)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(packed.shape[0], -1)[:, :out]
    return codes.T.float() - 8


def _offset(slots: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """(q - zero) * scale as q * scale + offset."""
    if slots["zero"].shape != slots["scale"].shape:
        raise ValueError(
            f"its zero points {list(slots['zero'].shape)} are not those of its scales {list(slots['scale'].shape)}."
        )
    return {**slots, "zero": -slots["zero"] * slots["scale"]}


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("compressed-tensors files are read, not written")


def marks(layers: Mapping[str, str]) -> Marks:
    held = set(layers.values())
    layout = {"nibble": "even low"} if held & {"nvfp4", "mxfp4"} else {}
    return Marks(layout=layout | ({"block scales": "plain"} if held & {"nvfp4", "mxfp8", "mxfp4"} else {}))


DIALECT = Dialect(
    name="compressed_tensors",
    row="H1, H2",
    meaning="compressed-tensors: even element in the low nibble, plain block scales, a global scale that divides",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=marks,
)
