"""The two files of the case this library began with: an FP8 one that worked, and an NVFP4 one that rendered as noise.

Neither says who wrote it. The FP8 recipe takes scale = amax, so its codes lie in -1..1; the NVFP4 file has norms,
biases and modulation in fp16 and no input_scale.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.builders.codes import E4M3, nearest, pack, tile_order
from tests.builders.files import Content, codes_as, nvfp4


def working_fp8(state: dict[str, torch.Tensor], modules: list[str], *, scalar: bool = False) -> Content:
    """`scale_weight` of shape [1], or [] for `scalar`; norms and biases in fp32; no marker."""
    content = Content(dict(state))
    for module in modules:
        weight = state[f"{module}.weight"].double().numpy()
        scale = float(np.float32(np.abs(weight).max()))
        codes = nearest(weight / scale, E4M3)
        content.tensors[f"{module}.weight"] = codes_as(codes, torch.float8_e4m3fn)
        content.tensors[f"{module}.scale_weight"] = torch.full([] if scalar else [1], scale)
        content.weights[module] = E4M3[codes] * scale
    return content


def broken_nvfp4(state: dict[str, torch.Tensor], modules: list[str], *, comfy: bool = False) -> Content:
    """Even-low with plain block scales, or even-high with tile order for `comfy`: the shapes are the same."""
    content = Content({key: tensor.half() for key, tensor in state.items()})
    for module in modules:
        codes, block_codes, scale, content.weights[module] = nvfp4(state[f"{module}.weight"].double().numpy())
        scales = tile_order(block_codes) if comfy else block_codes
        content.tensors |= {
            f"{module}.weight": codes_as(pack(codes, even_high=comfy)),
            f"{module}.weight_scale": codes_as(scales, torch.float8_e4m3fn),
            f"{module}.weight_scale_2": torch.tensor(scale, dtype=torch.float32),
        }
    return content
