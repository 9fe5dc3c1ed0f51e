"""Runs Model Optimizer's other algorithms: `python -m tests.conformance.produce_modelopt FOLDER`, as produce.py does.

FOLDER/NAME/ gets the exported folder, FOLDER/NAME.expected.safetensors the fp32 weights that Model Optimizer's own
tensor classes dequantise to. Imports no
wan_runtime.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.builders.wan import state

Tensors = dict[str, torch.Tensor]
# name -> Model Optimizer's own configuration; those of several algorithms are put together in `_mixed`.
CONFIGS = {
    "fp8-per-channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8-blocks": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int8-weight-only": "INT8_WEIGHT_ONLY_CFG",
    "int8-smoothed": "INT8_SMOOTHQUANT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "w4a8": "W4A8_NVFP4_FP8_CFG",
    "w4a16": "W4A16_NVFP4_CFG",
    "mixed": "",
}
PARTS = {"*attn1*": "MXFP8_DEFAULT_CFG", "*attn2*": "W4A8_NVFP4_FP8_CFG", "*ffn*": "INT8_DEFAULT_CFG"}


def _config(name: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    if CONFIGS[name]:
        return copy.deepcopy(getattr(mtq, CONFIGS[name]))
    mixed: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    for modules, part in PARTS.items():
        for rule in getattr(mtq, part)["quant_cfg"]:
            if rule["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
                kind = rule["quantizer_name"].removeprefix("*")
                mixed["quant_cfg"].append({**copy.deepcopy(rule), "quantizer_name": f"{modules}{kind}"})
    return mixed


def _export(name: str, folder: Path) -> None:
    import modelopt.torch.quantization as mtq
    from diffusers import WanTransformer3DModel
    from modelopt.torch.export import export_hf_checkpoint

    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    model.load_state_dict(state(spelling="diffusers"))
    model = model.to(torch.bfloat16).eval()

    def calibrate(module: torch.nn.Module) -> None:
        video, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 7, 32)
        with torch.no_grad():
            module(video.bfloat16(), torch.tensor([500.0]), text.bfloat16())

    config = _config(name)
    # Left out before calibration: SmoothQuant would smooth these too, and export their scales beside bf16 weights.
    outside = ("patch_embedding*", "condition_embedder*", "proj_out*")
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in outside]
    model = mtq.quantize(model, config, calibrate)
    export_hf_checkpoint(model, export_dir=folder)


def _dequantised(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One layer by Model Optimizer's class for it; which class, the dtypes say."""
    from modelopt.torch.quantization import qtensor

    weight, scale = own["weight"], own["weight_scale"]
    shape = torch.Size((weight.shape[0], weight.shape[1] * (2 if weight.dtype is torch.uint8 else 1)))
    fp32, value = torch.float32, None
    if weight.dtype is torch.int8:
        value = qtensor.INT8QTensor(shape, fp32, weight).dequantize(fp32, scale=scale[:, None])
    elif weight.dtype is torch.uint8 and scale.dtype is torch.uint8:
        packed = qtensor.MXFP4QTensor(shape, fp32, weight)
        value = packed.dequantize(fp32, scale=scale, block_sizes={-1: 32})
    elif weight.dtype is torch.uint8:
        sizes, double = {-1: shape[1] // scale.shape[1]}, own["weight_scale_2"]
        packed = qtensor.NVFP4QTensor(shape, fp32, weight)
        value = packed.dequantize(scale=scale, double_scale=double, block_sizes=sizes)
    elif scale.dtype is torch.uint8:
        value = qtensor.MXFP8QTensor(shape, fp32, weight).dequantize(fp32, scale=scale)
    elif scale.dim() == 4:
        blocks = qtensor.FP8QTensor(shape, fp32, weight)
        value = blocks.dequantize(fp32, scale=scale[:, 0, :, 0], block_sizes={-1: 128, -2: 128})
    else:
        value = qtensor.FP8QTensor(shape, fp32, weight).dequantize(fp32, scale=scale.reshape(-1, 1))
    result: torch.Tensor = value.float()
    # SmoothQuant's scale multiplies the input, so for the weight that the layer stands for it does too.
    return result * own["pre_quant_scale"].float() if "pre_quant_scale" in own else result


def run(root: Path) -> None:
    torch.set_num_threads(1)
    base = state(spelling="diffusers")
    for name in CONFIGS:
        torch.manual_seed(0)
        folder = root / name
        folder.mkdir()
        _export(name, folder)
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        expected: Tensors = {}
        for module in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
            own = {
                key.removeprefix(f"{module}."): t
                for key, t in tensors.items()
                if key.startswith(f"{module}.")
            }
            expected[module] = _dequantised(own).contiguous()
            # Whatever the classes say, it must be near what was quantised.
            true = base[f"{module}.weight"]
            error = ((expected[module] - true).norm() / true.norm()).item()
            assert error < 0.2, f"{name} {module}: {error}"
        save_file(expected, f"{folder}.expected.safetensors")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
