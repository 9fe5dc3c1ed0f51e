"""Files of tools that are recognised and not read: refused by the tool's name, with what to do instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import files
from tests.builders.wan import block_linears, state
from tests.reading import host, refused
from wan_runtime.containers import read_header
from wan_runtime.dialects._refused import KINDS
from wan_runtime.errors import UnreadDialect

__all__ = ["host"]  # the fixture

F8, U8, I8, I32, BF16, F32 = (
    torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32, torch.bfloat16, torch.float32,
)  # fmt: skip
Written = dict[str, tuple[torch.dtype, tuple[int, ...]]]
# What each tool writes in place of a layer's weight, and words that its refusal must have.
TOOLS: dict[str, tuple[Written, tuple[str, ...]]] = {
    "nunchaku": (
        {
            "qweight": (I8, (128, 64)),
            "wscales": (BF16, (2, 128)),
            "smooth_factor": (BF16, (128,)),
            "proj_down": (BF16, (128, 32)),
            "proj_up": (BF16, (128, 32)),
        },
        ("nunchaku (SVDQuant)", ".qweight, .wscales", "permuted"),
    ),
    "GPTQ": (
        {"qweight": (I32, (16, 128)), "qzeros": (I32, (1, 16)), "scales": (BF16, (1, 128))},
        ("GPTQ or AWQ", ".qweight, .qzeros"),
    ),
    "Marlin": (
        {"weight": (I32, (8, 256)), "weight_scale": (BF16, (1, 128)), "weight_workspace": (I32, (16,))},
        ("LightX2V's int4-g128-marlin", "weight_workspace", "fp8, int8 or nvfp4"),
    ),
    "bitsandbytes nf4": (
        {
            "weight": (U8, (8192, 1)),
            "weight.absmax": (U8, (256,)),
            "weight.quant_map": (F32, (16,)),
            "weight.nested_absmax": (F32, (1,)),
            "weight.quant_state.bitsandbytes__nf4": (U8, (90,)),
        },
        ("bitsandbytes", "absmax"),
    ),
    "bitsandbytes int8": (
        {"weight": (I8, (128, 128)), "SCB": (F32, (128,)), "weight_format": (U8, ())},
        ("bitsandbytes", ".SCB"),
    ),
    "Model Optimizer, not exported": (
        {"weight": (BF16, (128, 128)), "weight_quantizer._amax": (F32, ()), "input_quantizer._amax": (F32, ())},
        ("Model Optimizer", "_quantizer._amax", "export_hf_checkpoint"),
    ),
    "Transformer Engine": (
        {"weight": (BF16, (128, 128)), "_extra_state": (U8, (512,))},
        ("Transformer Engine", "_extra_state", "patch()"),
    ),
    "Transformer Engine, NVFP4": (
        {"weight.rowwise_data": (U8, (128, 64)), "weight.rowwise_scale_inv": (U8, (128, 8))},
        ("Transformer Engine", "rowwise_"),
    ),
    "SDNQ": (
        {"weight": (U8, (128, 2, 64)), "scale": (BF16, (128, 2, 1)), "zero_point": (BF16, (128, 2, 1))},
        ("SDNQ", ".scale", "sdnq package"),
    ),
    "SDNQ with a low-rank branch": (
        {"weight": (BF16, (128, 128)), "svd_up": (BF16, (128, 32)), "svd_down": (BF16, (32, 128))},
        ("SDNQ", ".svd_up, .svd_down"),
    ),
    "quanto int4": (
        {"weight._data._data": (U8, (128, 64)), "weight._scale": (BF16, (128, 1)), "weight._shift": (BF16, (128, 1))},
        ("quanto's qint4 or qint2", "qint8 release"),
    ),
}  # fmt: skip


def _write(folder: Path, written: Written, config: dict[str, Any] | None = None) -> Path:
    tensors = state()
    for module in block_linears():
        del tensors[f"{module}.weight"]
        for leaf, (dtype, shape) in written.items():
            tensors[f"{module}.{leaf}"] = torch.ones(shape).to(dtype)
    return files.Content(tensors, config=config).write(folder)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_of_the_tool_is_refused_by_its_name(host: torch.nn.Module, tmp_path: Path, tool: str) -> None:
    written, words = TOOLS[tool]
    refused(host, _write(tmp_path, written), UnreadDialect, *words, "Instead, ")


def test_pickled_torchao_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Its subclasses are saved, and opened where torchao was never imported, each in a process of its own."""
    write = """
import torch
from torchao.quantization import Int8Tensor, PerRow
weight = Int8Tensor.from_hp(torch.randn(128, 128), granularity=PerRow())
torch.save({"blocks.0.self_attn.q.weight": weight}, "wan.pt")
"""
    read = """
import wan_runtime
from wan_runtime.errors import CheckpointError
try:
    wan_runtime.convert("wan.pt", "new.safetensors", "bf16")
except CheckpointError as error:
    print(error)
"""
    for program in (write, read):
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "torchao's tensor subclasses, pickled" in done.stdout
    assert "flatten_tensor_state_dict" in done.stdout
    assert not (tmp_path / "new.safetensors").exists()


def test_sdnq_is_known_by_its_configuration(host: torch.nn.Module, tmp_path: Path) -> None:
    config = {"_class_name": "WanTransformer3DModel", "quantization_config": {"quant_method": "sdnq"}}
    path = _write(tmp_path, {"weight": (F8, (128, 128)), "weight_scale": (F32, (128, 1))}, config)
    refused(host, path, UnreadDialect, "SDNQ", "quant_method 'sdnq'")


def test_every_kind_that_is_listed_has_its_file_here(tmp_path: Path) -> None:
    met = set()
    for number, (written, _) in enumerate(TOOLS.values()):
        header = read_header(_write(tmp_path / str(number), written))
        met |= {kind.tool for kind in KINDS if kind.marked(header)}
    assert met == {kind.tool for kind in KINDS}
