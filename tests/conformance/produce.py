"""Runs real producers: `python -m tests.conformance.produce FOLDER NAME...`, each in a process away from the tests.

For each producer named, FOLDER/NAME/ gets the file as that producer writes it, and FOLDER/NAME.expected.safetensors the
fp32 weights that the producer's own dequantisation gives for it. Nothing here imports wan_runtime.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.builders.wan import block_linears, state

Tensors = dict[str, torch.Tensor]


def _rest(tensors: Tensors, modules: list[str]) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.removesuffix(".weight") not in modules}


def comfy_kitchen(folder: Path, layout: str, mark: str) -> Tensors:
    """comfy-kitchen's QuantizedTensor, saved under the key suffixes it gives, with ComfyUI's record a layer."""
    import comfy_kitchen.tensor  # noqa: F401  registers the layouts
    from comfy_kitchen.tensor import QuantizedTensor

    base, modules = state(prefix="model.diffusion_model."), block_linears(prefix="model.diffusion_model.")
    tensors, expected = _rest(base, modules), {}
    for module in modules:
        quantised = QuantizedTensor.from_float(base[f"{module}.weight"], layout)
        tensors |= quantised.state_dict(f"{module}.weight")
        tensors[f"{module}.comfy_quant"] = torch.tensor(
            list(json.dumps({"format": mark}).encode()), dtype=torch.uint8
        )
        expected[module] = quantised.dequantize().float()
    save_file(tensors, folder / "model.safetensors")
    return expected


def convert_to_quant(folder: Path, *options: str) -> Tensors:
    """convert_to_quant's command line on a bf16 file under the original names."""
    from convert_to_quant.calibrate_activation_scales import dequantize_fp8_weight
    from convert_to_quant.convert_to_quant import main
    from convert_to_quant.converters.nvfp4_converter import dequantize_nvfp4

    source, target = folder.with_suffix(".bf16.safetensors"), folder / "model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in state().items()}, source)
    sys.argv = [
        "convert_to_quant",
        "-i",
        str(source),
        "-o",
        str(target),
        "--comfy_quant",
        "--simple",
        "--wan",
    ]
    sys.argv += ["--device", "cpu", *options]
    gc.freeze()  # it collects after every layer, and torch's own modules take half a second each time
    main()
    tensors, expected = load_file(target), {}
    for module in [key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")]:
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        if weight.dtype is torch.uint8:
            expected[module] = dequantize_nvfp4(
                weight, scale, tensors[f"{module}.weight_scale_2"], torch.float32
            )
        else:
            expected[module] = dequantize_fp8_weight(weight, scale)
    return expected


def modelopt(folder: Path, config: str) -> Tensors:
    """Model Optimizer: calibrate diffusers' model, export it as it exports any diffusers component."""
    import modelopt.torch.quantization as mtq
    from diffusers import WanTransformer3DModel
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    model.load_state_dict(state(spelling="diffusers"))
    model = model.to(torch.bfloat16).eval()

    def calibrate(module: torch.nn.Module) -> None:
        video, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 7, 32)
        with torch.no_grad():
            module(video.bfloat16(), torch.tensor([500.0]), text.bfloat16())

    model = mtq.quantize(model, getattr(mtq, config), calibrate)
    outside = ("patch_embedding", "condition_embedder", "proj_out")
    mtq.disable_quantizer(model, lambda name: name.startswith(outside))
    export_hf_checkpoint(model, export_dir=folder)
    tensors, expected = load_file(folder / "diffusion_pytorch_model.safetensors"), {}
    for module in [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]:
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        if weight.dtype is torch.uint8:
            shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
            expected[module] = NVFP4QTensor(shape, torch.float32, weight).dequantize(
                scale=scale, double_scale=tensors[f"{module}.weight_scale_2"], block_sizes={-1: 16}
            )
        else:
            expected[module] = FP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale)
    return expected


PRODUCERS: dict[str, Callable[[Path], Tensors]] = {
    "comfy-kitchen-fp8": lambda folder: comfy_kitchen(folder, "TensorCoreFP8Layout", "float8_e4m3fn"),
    "comfy-kitchen-nvfp4": lambda folder: comfy_kitchen(folder, "TensorCoreNVFP4Layout", "nvfp4"),
    "convert_to_quant-fp8": lambda folder: convert_to_quant(folder),
    "convert_to_quant-fp8-row": lambda folder: convert_to_quant(folder, "--scaling_mode", "row"),
    "convert_to_quant-nvfp4": lambda folder: convert_to_quant(folder, "--nvfp4"),
    "modelopt-fp8": lambda folder: modelopt(folder, "FP8_DEFAULT_CFG"),
    "modelopt-nvfp4": lambda folder: modelopt(folder, "NVFP4_DEFAULT_CFG"),
}


def run(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        folder = root / name
        folder.mkdir()
        expected = PRODUCERS[name](folder)
        save_file(
            {module: weight.contiguous() for module, weight in expected.items()},
            f"{folder}.expected.safetensors",
        )


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
