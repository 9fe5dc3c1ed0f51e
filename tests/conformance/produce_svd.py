"""Runs Model Optimizer's SVDQuant and AWQ as produce.py does: `python -m tests.conformance.produce_svd FOLDER NAME...`.

Their calibration simulates NVFP4 products, for which Model Optimizer has kernels for a GPU alone; here its own CPU
quantiser (NVFP4QTensor, the one it exports with) stands in for that kernel. Nothing here imports wan_runtime.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.builders.wan import block_linears, state

CONFIGS = {"modelopt-svdquant": "NVFP4_SVDQUANT_DEFAULT_CFG", "modelopt-awq": "NVFP4_AWQ_LITE_CFG"}
RANK = 8
Tensors = dict[str, torch.Tensor]


def _quantise_on_cpu() -> None:
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def simulated(inputs: torch.Tensor, block_size: int, amax: torch.Tensor, *bits: int) -> Any:
        rows = inputs.reshape(-1, inputs.shape[-1])
        packed, scale, double = NVFP4QTensor.quantize(rows, block_size, None, amax.float().amax() / (6 * 448))
        value = packed.dequantize(scale=scale, double_scale=double, block_sizes={-1: block_size})
        return value.reshape(inputs.shape).to(inputs.dtype)

    tensor_quant.dynamic_block_quantize_op = simulated


def produce(folder: Path, config: str) -> Tensors:
    """The exported folder, and (dequantised + b @ a) * pre_quant_scale, as SVDQuantLinear.forward computes."""
    import modelopt.torch.quantization as mtq
    from diffusers import WanTransformer3DModel
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    model: Any = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    model.load_state_dict(state(spelling="diffusers"))
    model = model.to(torch.bfloat16).eval()

    @torch.no_grad()
    def calibrate(module: torch.nn.Module) -> None:
        """Each Linear on inputs whose channels differ in size, which is what the smoothing is for."""
        for name in block_linears(spelling="diffusers"):
            linear: Any = module.get_submodule(name)
            channels = torch.linspace(0.1, 3, linear.in_features)
            linear((torch.randn(16, linear.in_features) * channels).bfloat16())

    chosen = copy.deepcopy(getattr(mtq, config))
    outside = ("patch_embedding", "condition_embedder", "proj_out")
    chosen["quant_cfg"] += [{"quantizer_name": f"*{name}*", "enable": False} for name in outside]
    if "SVD" in config:
        chosen["algorithm"]["lowrank"] = RANK
    model = mtq.quantize(model, chosen, calibrate)
    export_hf_checkpoint(model, export_dir=folder)
    tensors, expected = load_file(folder / "diffusion_pytorch_model.safetensors"), {}
    for module in block_linears(spelling="diffusers"):
        own = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{module}.")}
        shape = torch.Size((own["weight"].shape[0], own["weight"].shape[1] * 2))
        value = NVFP4QTensor(shape, torch.float32, own["weight"]).dequantize(
            scale=own["weight_scale"], double_scale=own["weight_scale_2"], block_sizes={-1: 16}
        )
        if "svdquant_lora_a" in own:
            value = value + own["svdquant_lora_b"].float() @ own["svdquant_lora_a"].float()
        expected[module] = value * own["pre_quant_scale"].float()
    return expected


def run(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    _quantise_on_cpu()
    for name in names:
        torch.manual_seed(0)
        folder = root / name
        folder.mkdir()
        expected = produce(folder, CONFIGS[name])
        save_file(
            {module: w.contiguous() for module, w in expected.items()}, f"{folder}.expected.safetensors"
        )


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
