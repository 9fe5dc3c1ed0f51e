"""Exports one NVFP4 model by Model Optimizer with every choice of its ComfyUI post-process: `... FOLDER`.

FOLDER/NAME/ gets each export, FOLDER/expected.safetensors the weights by its own dequantisation of the one without.
Nothing here imports wan_runtime.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.builders.wan import state

EXPORTS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "padded": {"padding_strategy": "row"},
    "padded-wide": {"padding_strategy": "row_col"},
    "swizzled": {"enable_swizzle_layout": True},
    "metadata": {"enable_layerwise_quant_metadata": True},
    "padded-swizzled-metadata": {
        "padding_strategy": "row_col",
        "enable_swizzle_layout": True,
        "enable_layerwise_quant_metadata": True,
    },
}


def main(root: Path) -> None:
    import modelopt.torch.quantization as mtq
    from diffusers import WanTransformer3DModel
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, options in EXPORTS.items():
        model = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
        )
        model.load_state_dict(state(spelling="diffusers"))
        model = mtq.quantize(model.to(torch.bfloat16).eval(), mtq.NVFP4_DEFAULT_CFG, calibrate)
        outside = ("patch_embedding", "condition_embedder", "proj_out")
        mtq.disable_quantizer(model, lambda layer: layer.startswith(outside))  # noqa: B023
        export_hf_checkpoint(model, export_dir=root / name, **options)
    tensors = load_file(root / "untouched" / "diffusion_pytorch_model.safetensors")
    expected = {}
    for module in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        weight = tensors[f"{module}.weight"]
        shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
        expected[module] = NVFP4QTensor(shape, torch.float32, weight).dequantize(
            scale=tensors[f"{module}.weight_scale"],
            double_scale=tensors[f"{module}.weight_scale_2"],
            block_sizes={-1: 16},
        )
    save_file(
        {module: weight.contiguous() for module, weight in expected.items()}, root / "expected.safetensors"
    )


def calibrate(model: torch.nn.Module) -> None:
    video, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 7, 32)
    with torch.no_grad():
        model(video.bfloat16(), torch.tensor([500.0]), text.bfloat16())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
