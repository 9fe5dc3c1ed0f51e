"""Runs comfy-kitchen and convert_to_quant over every scheme they can write, as produce.py does for the common ones.

`python -m tests.conformance.produce_comfy FOLDER NAME...`: FOLDER/NAME/model.safetensors is the producer's file, and
FOLDER/NAME.expected.safetensors the fp32 weights that its own code dequantises. Nothing here imports wan_runtime.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.builders.wan import TINY, Sizes, block_linears, state

Tensors = dict[str, torch.Tensor]
GROUP = 64  # of the rotations: the default of 256 does not divide the tiny model's 128 columns


def kitchen(
    folder: Path, layout: str, record: dict[str, object], sizes: Sizes = TINY, **options: Any
) -> Tensors:
    """comfy-kitchen's QuantizedTensor, saved under the key suffixes it gives, with ComfyUI's record a layer."""
    import comfy_kitchen.tensor  # noqa: F401  registers the layouts
    from comfy_kitchen.tensor import QuantizedTensor

    base, modules = state(sizes), block_linears(sizes)
    if sizes != TINY:  # the width of `ffn` divides no block: only rows may be padded
        modules = [module for module in modules if not module.endswith("ffn.2")]
    tensors, expected = {k: t for k, t in base.items() if k.removesuffix(".weight") not in modules}, {}
    for module in modules:
        weight = base[f"{module}.weight"].float()
        quantised = QuantizedTensor.from_float(weight, layout, **options)
        tensors |= quantised.state_dict(f"{module}.weight")
        tensors[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        expected[module] = quantised.dequantize().float()[: weight.shape[0], : weight.shape[1]]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return expected


def kitchen_awq(folder: Path) -> Tensors:
    """AWQ's codes are made elsewhere and only read by comfy-kitchen: random ones, dequantised by its layout."""
    from comfy_kitchen.tensor import TensorCoreAWQW4A16Layout as Layout

    base, modules = state(), block_linears()
    tensors, expected = {k: t for k, t in base.items() if k.removesuffix(".weight") not in modules}, {}
    record = torch.tensor(list(b'{"format": "awq_w4a16"}'), dtype=torch.uint8)
    for module in modules:
        out, inp = base[f"{module}.weight"].shape
        codes = torch.randint(-128, 128, (out, inp // 2), dtype=torch.int8)
        params = Layout.Params(
            scale=torch.rand(inp // 64, out).bfloat16() * 0.01 + 0.001,
            zeros=torch.randn(inp // 64, out).bfloat16() * 0.01,
            orig_dtype=torch.float32,
            orig_shape=(out, inp),
        )
        stored = Layout.state_dict_tensors(codes, params)
        tensors |= {f"{module}.weight{suffix}": tensor for suffix, tensor in stored.items()}
        tensors[f"{module}.comfy_quant"] = record.clone()
        expected[module] = Layout.dequantize(codes, params).float()
    save_file(tensors, folder / "model.safetensors")
    return expected


def quant_tool(folder: Path, *options: str, then: tuple[str, ...] = ()) -> Tensors:
    """convert_to_quant's command line on a bf16 file under the original names; `then` is a second run on its result."""
    from convert_to_quant.convert_to_quant import main

    source, target = folder.with_suffix(".bf16.safetensors"), folder / "model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in state().items()}, source)
    first = folder.with_suffix(".first.safetensors") if then else target
    shared = ["--simple", "--wan", "--device", "cpu", "--comfy_quant"]
    gc.freeze()  # it collects after every layer, and torch's own modules take half a second each time
    sys.argv = ["convert_to_quant", "-i", str(source), "-o", str(first), *shared, *options]
    main()
    if then:
        sys.argv = ["convert_to_quant", "-i", str(first), "-o", str(target), *then]
        main()
    tensors = load_file(target)
    modules = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    return {module: _dequantised(tensors, module) for module in modules}


def _dequantised(tensors: Tensors, module: str) -> Any:
    from convert_to_quant.calibrate_activation_scales import dequantize_fp8_weight
    from convert_to_quant.comfy.quant_ops import BlockWiseINT8Layout, TensorWiseINT8Layout
    from convert_to_quant.converters.mxfp8_converter import dequantize_mxfp8
    from convert_to_quant.converters.nvfp4_converter import dequantize_nvfp4
    from convert_to_quant.utils.convrot import build_hadamard, rotate_weight

    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    record = json.loads(bytes(tensors[f"{module}.comfy_quant"].tolist()))
    kind = record["format"]
    if kind == "nvfp4":
        return dequantize_nvfp4(weight, scale, tensors[f"{module}.weight_scale_2"], torch.float32)
    if kind in ("mxfp8", "hybrid_mxfp8"):
        return dequantize_mxfp8(weight, scale.view(torch.float8_e8m0fnu), torch.float32)
    if kind == "int8_blockwise":
        size = record["group_size"]
        return BlockWiseINT8Layout.dequantize(weight, scale, size, is_weight=True, orig_dtype=torch.float32)
    if weight.dtype is torch.int8:
        value = TensorWiseINT8Layout.dequantize(weight, scale, orig_dtype=torch.float32)
        if not record.get("convrot"):
            return value
        return rotate_weight(value, build_hadamard(record["convrot_groupsize"]), record["convrot_groupsize"])
    if scale.dim() == 3:  # its reader knows no such scale; its writer divides groups of a row by it
        groups = weight.float().reshape(weight.shape[0], scale.shape[1], -1)
        return (groups * scale).reshape(weight.shape)
    return dequantize_fp8_weight(weight, scale)


def _kitchen(layout: str, mark: str, rotated: bool = False, **options: Any) -> Callable[[Path], Tensors]:
    record: dict[str, object] = {"format": mark}
    if rotated:
        options["convrot_groupsize"] = record["convrot_groupsize"] = GROUP
        if mark == "int8_tensorwise":
            options["convrot"] = record["convrot"] = True
    if mark == "asym_w4a8_int8":
        record["group_size"] = 16
    return functools.partial(kitchen, layout=layout, record=record, **options)


def _tool(*options: str, **further: Any) -> Callable[[Path], Tensors]:
    return lambda folder: quant_tool(folder, *options, **further)


# name -> (format that it is held in, producer)
PRODUCERS: dict[str, tuple[str, Callable[[Path], Tensors]]] = {
    "kitchen-mxfp8": ("mxfp8", _kitchen("TensorCoreMXFP8Layout", "mxfp8")),
    "kitchen-mxfp8-padded": ("mxfp8", _kitchen("TensorCoreMXFP8Layout", "mxfp8", sizes=Sizes(ffn=264))),
    "kitchen-nvfp4-padded": ("nvfp4", _kitchen("TensorCoreNVFP4Layout", "nvfp4", sizes=Sizes(ffn=264))),
    "kitchen-int8": ("int8", _kitchen("TensorWiseINT8Layout", "int8_tensorwise")),
    "kitchen-int8-row": ("int8", _kitchen("TensorWiseINT8Layout", "int8_tensorwise", per_channel=True)),
    "kitchen-int8-rotated": (
        "int8", _kitchen("TensorWiseINT8Layout", "int8_tensorwise", True, per_channel=True),
    ),
    "kitchen-w4a4": ("int4", _kitchen("TensorCoreConvRotW4A4Layout", "convrot_w4a4", True)),
    "kitchen-w4a8": ("int8", _kitchen("AsymW4A8Int8Layout", "asym_w4a8_int8", True)),
    "kitchen-w4a8-uniform": ("int8", _kitchen("AsymW4A8Int8Layout", "asym_w4a8_int8", True, codebook=False)),
    "kitchen-w4a8-asymmetric": (
        "int8", _kitchen("AsymW4A8Int8Layout", "asym_w4a8_int8", True, symmetric=False),
    ),
    "kitchen-w4a8-fp32-scales": (
        "int8", _kitchen("AsymW4A8Int8Layout", "asym_w4a8_int8", True, scale_dtype=torch.float32),
    ),
    "kitchen-w6a8": ("int8", _kitchen("AsymW4A8Int8Layout", "asym_w4a8_int8", True, bits=6)),
    "kitchen-awq": ("int4", kitchen_awq),
    "tool-fp8-block": ("fp8_block", _tool("--scaling_mode", "block", "--block_size", "64")),
    "tool-fp8-block3d": ("fp8_block", _tool("--scaling_mode", "block3d", "--block_size", "64")),
    "tool-int8": ("int8", _tool("--int8", "--scaling_mode", "tensor")),
    "tool-int8-row": ("int8", _tool("--int8", "--scaling_mode", "row")),
    "tool-int8-rotated": (
        "int8", _tool("--int8", "--scaling_mode", "row", "--convrot", "--save-quant-metadata"),
    ),
    "tool-int8-rotated-dynamic": (
        "int8",
        _tool("--int8", "--scaling_mode", "row", "--dynamic-convrot", "--convrot-group-size", "16"),
    ),
    "tool-int8-block": ("int8_block", _tool("--int8", "--scaling_mode", "block", "--block_size", "64")),
    "tool-mxfp8": ("mxfp8", _tool("--mxfp8")),
    "tool-mxfp8-hybrid": ("mxfp8", _tool("--mxfp8", then=("--make-hybrid-mxfp8",))),
    "tool-nvfp4-header": ("nvfp4", _tool("--nvfp4", "--save-quant-metadata")),
}  # fmt: skip


def run(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        folder = root / name
        folder.mkdir()
        expected = PRODUCERS[name][1](folder)
        save_file(
            {module: weight.float().contiguous() for module, weight in expected.items()},
            f"{folder}.expected.safetensors",
        )


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
