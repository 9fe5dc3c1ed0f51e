"""Runs real quantisation libraries: `python -m tests.conformance.produce_libraries FOLDER NAME...`, as produce.py does.

compressed-tensors, optimum-quanto and torchao quantise a tiny WAN model with their own code and write it; the expected
weights are what their own code dequantises, in fp32. Nothing here imports wan_runtime.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.builders.wan import block_linears, state

Tensors = dict[str, torch.Tensor]


def _model(dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    model.load_state_dict(state(spelling="diffusers"))
    return model if dtype is torch.float32 else model.to(dtype)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in block_linears(spelling="diffusers")}


def compressed_tensors(folder: Path, preset: str, **weights: Any) -> Tensors:
    """compressed-tensors' ModelCompressor on a diffusers model; the scales by its calculate_qparams."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = _model()
    scheme = preset_name_to_scheme(preset, [f"re:^{name}$" for name in _linears(model)])
    scheme.weights = scheme.weights.model_copy(update=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}))
    for module in _linears(model).values():
        _calibrate(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_config(folder)
    compressor.update_config(str(folder))
    save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / "model.safetensors")
    return {name: _decompressed(module) for name, module in _linears(model).items()}


def _calibrate(module: Any, args: Any) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = module.weight.data
    groups = {
        "tensor": lambda: weight.reshape(1, 1, -1),
        "channel": lambda: weight[:, None],
        "block": lambda: weight.unfold(0, 128, 128).unfold(1, 128, 128).flatten(2),
    }.get(args.strategy, lambda: weight.unflatten(1, (-1, args.group_size)))()
    low, high = groups.amin(-1), groups.amax(-1)
    total = None
    if hasattr(module, "weight_global_scale"):
        total = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(total)
        module.input_global_scale.data.fill_(700.0)
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.125)
    scale, zero = calculate_qparams(low, high, args, global_scale=total)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def _decompressed(module: Any) -> torch.Tensor:
    """As the library decompresses, but NVFP4 in fp32 where it would round to bf16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scheme, tensors = module.quantization_scheme, dict(module.state_dict())
    if scheme.format == "nvfp4-pack-quantized":
        packed = tensors["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32)
        weight: torch.Tensor = dequantize(
            x_q=codes,
            scale=tensors["weight_scale"].float(),
            args=scheme.weights,
            global_scale=tensors["weight_global_scale"],
            dtype=torch.float32,
        )
        return weight
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    return torch.as_tensor(compressor.decompress(tensors, scheme)["weight"]).float()


def quanto(folder: Path, kind: str, dtype: torch.dtype, *, sidecar: bool = False) -> Tensors:
    """optimum-quanto's quantize and freeze; the map in the header as Wan2GP puts it, or beside the file."""
    from optimum import quanto as library

    model = _model(dtype)
    library.quantize(model, weights=getattr(library, kind), include=list(_linears(model)))
    library.freeze(model)
    fields = json.dumps(library.quantization_map(model))
    mark = {
        "quantization_format": "quanto",
        "quantization_map_base64": base64.b64encode(fields.encode()).decode(),
    }
    save_file(model.state_dict(), folder / "model.safetensors", {} if sidecar else mark)
    if sidecar:
        (folder / "model_map.json").write_text(fields)
    expected: Tensors = {}
    for name, module in _linears(model).items():
        weight: Any = module.weight
        if kind == "qint4":  # packed: refused, so that nothing is expected of it
            continue
        expected[name] = (
            weight._data.float() * weight._scale.float()
        )  # its dequantize(), less the rounding to bf16
        torch.testing.assert_close(weight.dequantize().float(), expected[name], rtol=2**-7, atol=0)
    return expected


def torchao(folder: Path, quantise: Callable[[torch.Tensor], Any]) -> Tensors:
    """torchao's tensor subclasses through its own flatten_tensor_state_dict."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, expected = dict(_model().state_dict()), {}
    for name in block_linears(spelling="diffusers"):
        quantised = quantise(tensors[f"{name}.weight"])
        tensors[f"{name}.weight"] = quantised
        try:
            expected[name] = quantised.dequantize(torch.float32)
        except TypeError:  # Float8Tensor and Int8Tensor dequantise to the dtype they were made from
            expected[name] = quantised.dequantize()
        assert expected[name].dtype is torch.float32
    flat, metadata = flatten_tensor_state_dict(tensors)
    save_file(flat, folder / "model.safetensors", metadata)
    return expected


def _float8(weight: torch.Tensor, granularity: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Any:
    from torchao.quantization import Float8Tensor, PerBlock, PerRow, PerTensor

    kinds = {"row": PerRow(), "tensor": PerTensor(), "block": PerBlock([128, 128])}
    return Float8Tensor.from_hp(weight, dtype, granularity=kinds[granularity])


def _int8(weight: torch.Tensor, granularity: str) -> Any:
    from torchao.quantization import Int8Tensor, PerGroup, PerRow, PerTensor

    kinds = {"row": PerRow(), "tensor": PerTensor(), "group": PerGroup(32)}
    return Int8Tensor.from_hp(weight, granularity=kinds[granularity])


def _nvfp4(weight: torch.Tensor, swizzled: bool, two_level: bool = True) -> Any:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    total = weight.abs().amax() / 2688 if two_level else None
    return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=total, is_swizzled_scales=swizzled)


def _mx(weight: torch.Tensor, element: Any, swizzled: bool) -> Any:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(weight, element, 32, is_swizzled_scales=swizzled)


E4M3, E5M2, E2M1 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2
GROUPS: dict[str, dict[str, Callable[[Path], Tensors]]] = {  # a process each
    "compressed-tensors": {
        "nvfp4": lambda folder: compressed_tensors(folder, "NVFP4"),
        "mxfp4": lambda folder: compressed_tensors(folder, "MXFP4A16"),
        "mxfp8": lambda folder: compressed_tensors(folder, "MXFP8A16"),
        "fp8": lambda folder: compressed_tensors(folder, "FP8"),
        "fp8-row": lambda folder: compressed_tensors(folder, "FP8_DYNAMIC"),
        "fp8-block": lambda folder: compressed_tensors(folder, "FP8_BLOCK"),
        "int8": lambda folder: compressed_tensors(folder, "INT8"),
        "int8-packed": lambda folder: compressed_tensors(folder, "W8A16"),
        "int4": lambda folder: compressed_tensors(folder, "W4A16", group_size=32),
        "int4-asymmetric": lambda folder: compressed_tensors(folder, "W4A16_ASYM", group_size=64),
        "mxfp6": lambda folder: compressed_tensors(folder, "MXFP6A16"),
    },
    "quanto": {
        "int8": lambda folder: quanto(folder, "qint8", torch.bfloat16),
        "int8-fp32-sidecar": lambda folder: quanto(folder, "qint8", torch.float32, sidecar=True),
        "fp8": lambda folder: quanto(folder, "qfloat8", torch.bfloat16),
        "fp8-e5m2": lambda folder: quanto(folder, "qfloat8_e5m2", torch.bfloat16),
        "int4": lambda folder: quanto(folder, "qint4", torch.bfloat16),
    },
    "torchao": {
        "fp8-tensor": lambda folder: torchao(folder, lambda w: _float8(w, "tensor")),
        "fp8-row": lambda folder: torchao(folder, lambda w: _float8(w, "row")),
        "fp8-block": lambda folder: torchao(folder, lambda w: _float8(w, "block")),
        "fp8-e5m2": lambda folder: torchao(folder, lambda w: _float8(w, "row", E5M2)),
        "int8-tensor": lambda folder: torchao(folder, lambda w: _int8(w, "tensor")),
        "int8-row": lambda folder: torchao(folder, lambda w: _int8(w, "row")),
        "int8-group": lambda folder: torchao(folder, lambda w: _int8(w, "group")),
        "nvfp4": lambda folder: torchao(folder, lambda w: _nvfp4(w, False)),
        "nvfp4-swizzled": lambda folder: torchao(folder, lambda w: _nvfp4(w, True)),
        "nvfp4-one-level": lambda folder: torchao(folder, lambda w: _nvfp4(w, True, False)),
        "mxfp8": lambda folder: torchao(folder, lambda w: _mx(w, E4M3, False)),
        "mxfp8-swizzled": lambda folder: torchao(folder, lambda w: _mx(w, E4M3, True)),
        "mxfp6": lambda folder: torchao(folder, lambda w: _mx(w, "fp6_e3m2", False)),
        "mxfp4-swizzled": lambda folder: torchao(folder, lambda w: _mx(w, E2M1, True)),
        "mxfp6-e2m3": lambda folder: torchao(folder, lambda w: _mx(w, "fp6_e2m3", False)),
        "mxfp8-e5m2": lambda folder: torchao(folder, lambda w: _mx(w, E5M2, False)),
    },
}


def run(root: Path, group: str) -> None:
    torch.set_num_threads(1)
    for name, produce in GROUPS[group].items():
        folder = root / group / name
        folder.mkdir(parents=True)
        try:
            expected = produce(folder)
        except Exception as error:
            raise RuntimeError(f"{group} {name}") from error
        save_file(
            {module: weight.detach().contiguous() for module, weight in expected.items()},
            f"{folder}.expected.safetensors",
        )


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
