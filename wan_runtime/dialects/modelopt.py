"""NVIDIA Model Optimizer's unified export (C1 to C4), usually a diffusers folder with a config.json.

key                 dtype, shape                     meaning
X.weight            F8_E4M3 [out, in]                FP8 and MXFP8 codes
                    I8 [out, in]                     int8 codes
                    U8 [out, in / 2]                 NVFP4, MXFP4; the EVEN element in the LOW nibble
X.weight_scale      F32 [], [out]                    FP8, FP8 per channel, int8: W = code * weight_scale
                    F32 [out / 128, 1, in / 128, 1]  FP8 in blocks
                    F8_E4M3 [out, in / 16]           NVFP4 block scales, PLAIN row-major; [out, in / 32] for
                                                     W4A8_NVFP4_FP8
                    U8 [out, in / 32]                MXFP8, MXFP4 block scales, PLAIN: 2^(byte - 127)
X.weight_scale_2    F32 []                           NVFP4: W = E2M1[code] * weight_scale * weight_scale_2
X.input_scale       F32 [], optional                 activation amax / 448 (FP8, W4A8_NVFP4_FP8), / 2688 (NVFP4),
                                                     / 127 (int8)
X.pre_quant_scale   float [in], optional             the input is multiplied by it (SmoothQuant, AWQ)
X.svdquant_lora_a   float [r, in], optional          with svdquant_lora_b [out, r]: a branch that takes the scaled
                                                     input, so W = (what the codes mean + b @ a) * pre_quant_scale

The mark is `quantization_config` with quant_method or quant_algo in config.json. FP8 with a `weight_scale` means the
same whoever wrote it, so it is read without a mark; NVFP4 and MX are not. INT4 (AWQ) is not read.
Source: Model Optimizer, modelopt/torch/quantization/qtensor and export/quant_utils.py.
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
    _corrections,
    _keys,
    _modelopt_layers,
    _scaled,
    modelopt_comfy,
)
from wan_runtime.header import DTYPES, Header

# Keys of producers that share `weight_scale` but mean more by it than this dialect reads.
FOREIGN = {*_keys.MEANINGFUL, "weight_global_scale", "input_global_scale"} - _corrections.SVD


def detect(header: Header) -> Evidence | None:
    names = _keys.leaves(header)
    if "weight_scale" not in names or names & FOREIGN:
        return None
    if _keys.postprocessed(header):
        return None if names & _corrections.KEYS else _postprocessed(header)
    config = header.config.get("quantization_config")
    if isinstance(config, Mapping) and (config.get("quant_method") == "modelopt" or "quant_algo" in config):
        return Evidence(True, f"config.json says modelopt ({config.get('quant_algo', 'no quant_algo')})")
    if "weight_scale_2" in names:
        return Evidence(False, _keys.UNMARKED)
    if _scaled.has_wide_scales(header):
        return None  # `lightx2v` reads them, to the same weights
    fp8 = [k for k, e in header.entries.items() if e.dtype in _keys.FP8 and _keys.is_linear_weight(k, e)]
    scales = [header.entries[f"{key}_scale"] for key in fp8 if f"{key}_scale" in header.entries]
    if any(scale.dtype in _keys.FLOAT for scale in scales):
        return Evidence(False, "FP8 with .weight_scale, which multiplies for every producer")
    return None  # in bytes they are MXFP8's, in one of two orders


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
        block_scale = Source(f"{path}.weight_scale", "block_scale", _plain_block_scale)
        layer = _modelopt_layers.layer(header, path, block_scale)
        if layer is None:
            continue
        layers[path] = _corrections.branched(header, _corrections.smoothed(header, layer))
    return _keys.reading(header, layers)


def _plain_block_scale(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    cols = inp // 16
    wide = -(-cols // modelopt_comfy.WIDENED) * modelopt_comfy.WIDENED
    if tuple(tensor.shape) not in ((out, cols), (out, wide)):
        raise ValueError(
            f"plain block scales of a {out} x {inp} weight are [{out}, {cols}]; the file has {list(tensor.shape)}."
        )
    return modelopt_comfy.trimmed(tensor.view(torch.uint8), cols)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if weight_format in _modelopt_layers.MX:
        codes = slots["payload"].view(torch.float8_e4m3fn) if weight_format == "mxfp8" else slots["payload"]
        return {"weight": codes, "weight_scale": slots["block_scale"]}
    if weight_format == "nvfp4" or slots["scale"].numel() == 1:
        return _keys.encode(weight_format, slots)
    encoded = _keys.encode("fp8", {**slots, "scale": slots["scale"][:1]})
    codes = slots["payload"].view(DTYPES[_scaled.CODES[weight_format]])
    return {**encoded, "weight": codes, "weight_scale": slots["scale"].reshape(-1)}


def marks(layers: Mapping[str, str]) -> Marks:
    held = set(layers.values())
    layout = {"nibble": "even low"} if held & {"nvfp4", "mxfp4"} else {}
    return Marks(layout=layout | ({"block scales": "plain"} if held & {"nvfp4", "mxfp8", "mxfp4"} else {}))


DIALECT = Dialect(
    name="modelopt",
    row="C1-C5",
    meaning="Model Optimizer: NVFP4 with the even element in the low nibble and plain block scales",
    detect=detect,
    read=read,
    targets={"modelopt-fp8": "fp8", "modelopt-nvfp4": "nvfp4"},
    encode=encode,
    marks=marks,
)
