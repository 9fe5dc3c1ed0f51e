"""One-byte codes with a float scale that multiplies: FP8 and int8, a scale a tensor, a row or a block.

Every producer that writes these keys means the same by them, so one reading serves them all.
"""

from __future__ import annotations

import torch

from wan_runtime.dialects import Layer, Source, _keys
from wan_runtime.errors import BadTensor
from wan_runtime.header import Entry, Header

SCALE = "weight_scale"
FORMATS = {**_keys.FP8, "I8": "int8"}
CODES = {
    **_keys.CODES,
    "fp8_block": "F8_E4M3",
    "fp8_e5m2_block": "F8_E5M2",
    "int8": "I8",
    "int8_block": "I8",
}


def layer(
    header: Header, path: str, base: str = "", scale_leaf: str = SCALE, input_leaf: str = "input_scale"
) -> Layer:
    """The layer whose weight is F8_E4M3, F8_E5M2 or I8 [out, in]; its scale's shape says what one scale covers.

    `base` says what codes stored as U8 are. Raises BadTensor when the scale is missing or is no float.
    """
    key, scale = f"{path}.weight", f"{path}.{scale_leaf}"
    base = FORMATS.get(header.entries[key].dtype, base)
    shape = (header.entries[key].shape[0], header.entries[key].shape[1])
    if scale in header.entries and _in_blocks(header.entries[scale], shape[0]):
        _refuse_bytes(header, scale)
        sources = [Source(key, "payload", _keys.code_slot), Source(scale, "scale", block_scales)]
        return Layer(path, f"{base}_block", shape, (*sources, *_keys.input_scale(header, path, input_leaf)))
    return _keys.fp8_layer(header, path, scale_leaf, input_leaf, base)


def has_wide_scales(header: Header) -> bool:
    """Whether an FP8 weight has a float scale of two dimensions, as LightX2V writes them: a row or a block."""
    return any(
        entry.dtype in _keys.FP8
        and (scale := header.entries.get(f"{_keys.module(key)}.{SCALE}")) is not None
        and scale.dtype in _keys.FLOAT
        and len(scale.shape) == 2
        and scale.numel > 1
        for key, entry in header.entries.items()
        if _keys.is_linear_weight(key, entry)
    )


def block_scales(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Scales of blocks, any float dtype, [rows, columns] or musubi-tuner's [out, columns, 1] -> fp32 [rows, columns].

    The format says which counts are blocks.
    """
    return tensor.float().reshape(tensor.shape[:2])


def _in_blocks(scale: Entry, out: int) -> bool:
    shape = scale.shape[:-1] if len(scale.shape) == 3 and scale.shape[-1] == 1 else scale.shape
    return len(shape) == 2 and scale.shape != (out, 1)


def _refuse_bytes(header: Header, key: str) -> None:
    entry = header.entries[key]
    if entry.dtype not in _keys.FLOAT:
        raise BadTensor(
            header.path,
            key,
            f"the scale of a block of codes is a float; it is {entry.dtype} {list(entry.shape)}.",
        )
