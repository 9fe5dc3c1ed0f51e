"""Model Optimizer's NVFP4 after its ComfyUI post-process (C5) with `enable_swizzle_layout`.

key                 dtype, shape                            meaning
X.weight            U8 [up16(out), in / 2]                  NVFP4; the EVEN element in the LOW nibble, as in any of its
                                                            exports: the post-process swaps no nibbles
                    F8_E4M3 [out, in]                       FP8 codes
X.weight_scale      F8_E4M3 [up128(out), up4(in / 16)]      NVFP4 block scales, SWIZZLED in 128 x 4 tiles
                    F32 ()                                  FP8: W = code * weight_scale
X.weight_scale_2    F32 ()                                  NVFP4: W = E2M1[code] * weight_scale * weight_scale_2
X.input_scale       F32 (), optional                        activation amax / 448 (FP8) or / 2688 (NVFP4)

`padding_strategy`, `enable_swizzle_layout` and `enable_layerwise_quant_metadata` are independent, and each writes the
header's `quantization_config`; the third writes ComfyUI's `_quantization_metadata` too, which therefore proves nothing
about the nibbles here. Nothing says whether the scales were swizzled: a shape shows it where `out` is no multiple of
128 or in / 16 none of 4, and otherwise the layout test (wan_runtime/evidence.py). Without swizzling, it is `modelopt`'s
file. "row_col" padding makes the scales wider, with zeros.
Source: Model Optimizer, modelopt/torch/export/unified_export_hf.py and diffusers_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys, _scaled, _swizzle
from wan_runtime.header import Entry, Header

HEADER_KEY = "quantization_config"
# Keys of producers that share `weight_scale_2` but mean more than this dialect reads.
FOREIGN = {*_keys.MEANINGFUL, "weight_global_scale", "input_global_scale", "pre_quant_scale"}
WIDENED = 16  # what the "row_col" padding rounds the columns of the scales up to


def because(header: Header) -> str:
    """The evidence of such a file in words."""
    words = (
        f"the header's {HEADER_KEY} says Model Optimizer after its ComfyUI post-process (even element low)"
    )
    shown = shown_layout(header)
    return (
        f"{words}, and a layer's scales show by their shape that they are {shown}" if shown else f"{words}."
    )


def shown_layout(header: Header) -> str | None:
    """Either "plain" or "swizzled", where the shape or the padding of one layer's block scales shows it."""
    for key, scales in _packed(header):
        rows, cols = header.entries[key].shape[0], header.entries[key].shape[1] // 8
        if rows % 128 and scales.shape[0] in (rows, -(-rows // 128) * 128):
            return "plain" if scales.shape[0] == rows else "swizzled"
        if cols % 4 and scales.shape[1] == cols:
            return "plain"
        if scales.shape == (rows, -(-cols // WIDENED) * WIDENED) and scales.shape[1] > cols:
            stored = header.read_tensor(f"{key}_scale").view(torch.uint8)
            if not bool(stored[:, cols:].any()):
                return "plain"
            if not bool(_swizzle.unswizzle(stored, *stored.shape)[:, cols:].any()):
                return "swizzled"
    return None


def _packed(header: Header) -> Iterator[tuple[str, Entry]]:
    """The key of each packed weight, and its block scales."""
    for key, entry in header.entries.items():
        scales = header.entries.get(f"{key}_scale")
        if scales is not None and entry.dtype == "U8" and len(entry.shape) == len(scales.shape) == 2:
            yield key, scales


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if (
        not _keys.postprocessed(header)
        or (names - {"comfy_quant"}) & FOREIGN
        or shown_layout(header) == "plain"
    ):
        return None
    return Evidence(shown_layout(header) is not None, because(header))


def read(header: Header) -> Reading:
    layers: dict[str, Layer] = {}
    for key, entry in header.entries.items():
        path = _keys.module(key)
        if not _keys.is_linear_weight(key, entry):
            continue
        if entry.dtype in _keys.FP8:
            layers[path] = _scaled.layer(header, path)
        elif entry.dtype == "U8":
            payload = Source(key, "payload", _keys.code_slot)
            layers[path] = _keys.nvfp4_layer(
                header, path, payload, Source(f"{path}.weight_scale", "block_scale", _unswizzle)
            )
    return _keys.reading(header, layers)


def _unswizzle(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Scales of [out, in / 16], of which "row_col" padding may have widened the columns."""
    cols = inp // 16
    if tensor.ndim == 2 and tensor.shape[1] == -(-cols // WIDENED) * WIDENED:
        return trimmed(_swizzle.unswizzle(tensor.view(torch.uint8), out, tensor.shape[1]), cols)
    return _swizzle.unswizzle(tensor.view(torch.uint8), out, cols)


def trimmed(scales: torch.Tensor, cols: int) -> torch.Tensor:
    """The first columns of block scales; raises ValueError when the rest is not padding."""
    if scales.shape[1] > cols and bool(scales[:, cols:].any()):
        raise ValueError(
            f"its block scales have {scales.shape[1]} columns for {cols} blocks, and the others are not zero."
        )
    return scales[:, :cols].contiguous()


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError(
        "files of this post-process are read, not written: ComfyUI reads their nibbles wrong"
    )


DIALECT = Dialect(
    name="modelopt_comfy",
    row="C5",
    meaning="Model Optimizer after its ComfyUI post-process: NVFP4 with the even element in the low nibble and "
    "swizzled block scales",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=lambda layers: Marks(layout={"nibble": "even low", "block scales": "swizzled"}),
)
