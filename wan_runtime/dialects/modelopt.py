"""NVIDIA Model Optimizer's unified export (C1, C2), usually a diffusers folder with a config.json.

key                 dtype, shape                   meaning
X.weight            F8_E4M3 [out, in]              FP8 codes
                    U8 [out, in / 2]               NVFP4; the EVEN element in the LOW nibble
X.weight_scale      F32 ()                         FP8: W = code * weight_scale
                    F8_E4M3 [out, in / 16]         NVFP4 block scales, PLAIN row-major
X.weight_scale_2    F32 ()                         NVFP4: W = E2M1[code] * weight_scale * weight_scale_2
X.input_scale       F32 (), optional               activation amax / 448 (FP8) or / 2688 (NVFP4)

The mark is `quantization_config` with quant_method or quant_algo in config.json. FP8 with a `weight_scale` means the
same whoever wrote it, so it is read without a mark; NVFP4 is not.
Source: Model Optimizer, modelopt/torch/quantization/qtensor/nvfp4_tensor.py and export/quant_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wan_runtime.dialects import (
    Dialect,
    Evidence,
    Layer,
    Marks,
    Reading,
    Source,
    _keys,
    _scaled,
    modelopt_comfy,
)
from wan_runtime.header import Header

# Keys of producers that share `weight_scale` but mean more by it than this dialect reads.
FOREIGN = {*_keys.MEANINGFUL, "weight_global_scale", "input_global_scale"}


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if "weight_scale" not in names or names & FOREIGN:
        return None
    if _keys.postprocessed(header):
        return _postprocessed(header)
    config = header.config.get("quantization_config")
    if isinstance(config, Mapping) and (config.get("quant_method") == "modelopt" or "quant_algo" in config):
        return Evidence(True, f"config.json says modelopt ({config.get('quant_algo', 'no quant_algo')})")
    if "weight_scale_2" in names:
        return Evidence(False, _keys.UNMARKED)
    if _scaled.has_wide_scales(header):
        return None  # `lightx2v` reads them, to the same weights
    fp8 = any(e.dtype in _keys.FP8 for k, e in header.entries.items() if _keys.is_linear_weight(k, e))
    return Evidence(False, "FP8 with .weight_scale, which multiplies for every producer") if fp8 else None


def _postprocessed(header: Header) -> Evidence | None:
    """After the ComfyUI post-process, these are the files whose scales were not swizzled (see modelopt_comfy)."""
    shown = modelopt_comfy.shown_layout(header)
    if shown == "swizzled":
        return None
    return Evidence(shown is not None, modelopt_comfy.because(header))


def read(header: Header) -> Reading:
    layers: dict[str, Layer] = {}
    for key, entry in header.entries.items():
        path = _keys.module(key)
        if not _keys.is_linear_weight(key, entry):
            continue
        if entry.dtype in _keys.FP8:
            layers[path] = _scaled.layer(header, path)
        elif entry.dtype == "U8":
            layers[path] = _keys.nvfp4_layer(
                header,
                path,
                Source(key, "payload", _keys.code_slot),
                Source(f"{path}.weight_scale", "block_scale", _plain_block_scale),
            )
    return _keys.reading(header, layers)


def _plain_block_scale(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    cols = inp // 16
    wide = -(-cols // modelopt_comfy.WIDENED) * modelopt_comfy.WIDENED
    if tuple(tensor.shape) not in ((out, cols), (out, wide)):
        raise ValueError(
            f"plain block scales of a {out} x {inp} weight are [{out}, {cols}]; the file has {list(tensor.shape)}."
        )
    return modelopt_comfy.trimmed(tensor.view(torch.uint8), cols)


def marks(layers: Mapping[str, str]) -> Marks:
    return Marks(layout={"nibble": "even low", "block scales": "plain"} if "nvfp4" in layers.values() else {})


DIALECT = Dialect(
    name="modelopt",
    row="C1, C2, C5",
    meaning="Model Optimizer: NVFP4 with the even element in the low nibble and plain block scales",
    detect=detect,
    read=read,
    targets={"modelopt-fp8": "fp8", "modelopt-nvfp4": "nvfp4"},
    encode=_keys.encode,
    marks=marks,
)
