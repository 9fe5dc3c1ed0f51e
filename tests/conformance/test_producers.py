"""Files of the real producers mean to us what they mean to the producers.

comfy-kitchen, convert_to_quant and NVIDIA Model Optimizer quantise and write a tiny WAN model with their own code
(produce.py, in processes of their own), and the expected values are their own dequantisation of what they wrote.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import wan_runtime
from tests.builders.files import Content
from tests.builders.wan import block_linears, state
from tests.conformance.produce import PRODUCERS
from wan_runtime.checkpoint import open_checkpoint, read_layer, stream
from wan_runtime.errors import AmbiguousDialect
from wan_runtime.formats import FORMATS

pytestmark = pytest.mark.slow
DIALECTS = {"comfy-kitchen": "comfy", "convert_to_quant": "comfy", "modelopt": "modelopt"}
DTYPES = {"fp8": torch.float8_e4m3fn, "row": torch.float8_e4m3fn, "nvfp4": torch.uint8}


@pytest.fixture(scope="session")
def produced(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with every producer's file and expected weights; two processes, for each slow import once."""
    folder = tmp_path_factory.mktemp("produced")
    alone = [name for name in PRODUCERS if name.startswith("modelopt")]
    groups = [alone, [name for name in PRODUCERS if name not in alone]]
    runs = []
    for number, names in enumerate(groups):
        log = folder / f"{number}.log"
        command = [sys.executable, "-m", "tests.conformance.produce", str(folder), *names]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=root, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        runs.append((process, log))
    for process, log in runs:
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    return folder


def _expected(produced: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(f"{produced / name}.expected.safetensors")


def _written(produced: Path, name: str) -> dict[str, torch.Tensor]:
    [path] = (produced / name).glob("*.safetensors")
    return load_file(path)


@functools.cache
def _diffusers_key(key: str) -> str:
    """By diffusers' own converter, so that our renames are held to it too."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    key = key.removeprefix("model.diffusion_model.")
    if (
        ".attn1." in key
        or ".attn2." in key
        or ".net." in key
        or "norm2" in key
        or not key.startswith("blocks.")
    ):
        spelled = ("condition_embedder", "proj_out", "scale_shift_table", "blocks.")
        if key.startswith(spelled):
            return key
    return str(next(iter(convert_wan_transformer_to_diffusers({key: torch.zeros(1)}))))


@pytest.mark.parametrize("name", PRODUCERS)
def test_every_layer_is_what_the_producer_dequantises(produced: Path, name: str) -> None:
    expected = _expected(produced, name)
    checkpoint = open_checkpoint(produced / name)
    assert checkpoint.dialect.name == DIALECTS[name.split("-fp8")[0].removesuffix("-nvfp4")]
    assert len(checkpoint.layers) == len(expected) == 20
    kind = DTYPES[name.rpartition("-")[2]]
    by_module = {layer.module: path for path, layer in checkpoint.layers.items()}
    assert by_module.keys() == expected.keys()
    streamed = {item.path: item for item in stream(checkpoint, torch.device("cpu"))}
    for module, weight in expected.items():
        assert _written(produced, name)[f"{module}.weight"].dtype is kind
        path = by_module[module]
        dequantize = FORMATS[checkpoint.layers[path].format].dequantize
        for slots in (read_layer(checkpoint, path), streamed[path].slots):
            torch.testing.assert_close(dequantize(slots), weight, rtol=2**-22, atol=0)


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_loaded_model_computes_what_the_producer_s_weights_compute(produced: Path, name: str) -> None:
    """`load` against a stock diffusers model that holds the producer's own dequantised weights, in fp32."""
    from diffusers import WanTransformer3DModel

    expected = _expected(produced, name)
    weights = {f"{module}.weight": weight for module, weight in expected.items()}
    leaves = ("comfy_quant", "weight_scale", "weight_scale_2", "input_scale")
    others = {
        key: tensor.float()
        for key, tensor in _written(produced, name).items()
        if key not in weights and not key.endswith(leaves)
    }
    stock: Any = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    stock.load_state_dict({_diffusers_key(key): tensor for key, tensor in {**others, **weights}.items()})
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
    }
    model = wan_runtime.load(produced / name, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        ours, theirs = model(**inputs).sample, stock.eval()(**inputs).sample
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.std().item())


def test_without_its_config_model_optimizer_s_nvfp4_is_refused(produced: Path, tmp_path: Path) -> None:
    """The same bytes moved out of their folder: diffusers names alone do not say who wrote them."""
    name = "modelopt-nvfp4"
    [path] = (produced / name).glob("*.safetensors")
    alone = tmp_path / "model.safetensors"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(AmbiguousDialect):
        open_checkpoint(alone)
    checkpoint = open_checkpoint(alone, dialect="modelopt")
    for module, weight in _expected(produced, name).items():
        [path_of] = [p for p, layer in checkpoint.layers.items() if layer.module == module]
        read = FORMATS["nvfp4"].dequantize(read_layer(checkpoint, path_of))
        torch.testing.assert_close(read, weight, rtol=2**-22, atol=0)


def test_model_optimizer_s_input_scales_are_read(produced: Path) -> None:
    for name in ("modelopt-fp8", "modelopt-nvfp4"):
        written, checkpoint = _written(produced, name), open_checkpoint(produced / name)
        for path, layer in checkpoint.layers.items():
            read = read_layer(checkpoint, path)["input_scale"]
            assert read.item() == written[f"{layer.module}.input_scale"].item() > 0


WRITTEN = {  # target -> the producer whose own output for the same model ours is to match, and the names it uses
    "comfy-fp8": ("comfy-kitchen-fp8", "original"),
    "comfy-nvfp4": ("comfy-kitchen-nvfp4", "original"),
    "modelopt-fp8": ("modelopt-fp8", "diffusers"),
    "modelopt-nvfp4": ("modelopt-nvfp4", "diffusers"),
}


@pytest.mark.parametrize("target", WRITTEN)
def test_what_we_write_matches_the_producers_own_file_key_for_key(
    produced: Path, tmp_path: Path, target: str
) -> None:
    """The same model, converted by us from its plain weights: every key, dtype and shape, and the scales' values."""
    name, names = WRITTEN[target]
    theirs = {key.removeprefix("model.diffusion_model."): t for key, t in _written(produced, name).items()}
    plain = state(spelling=names)
    if names == "diffusers":  # Model Optimizer's run was in bf16
        plain = {key: tensor.bfloat16() for key, tensor in plain.items()}
    activations = dict.fromkeys(block_linears(), 1.0) if target.startswith("modelopt") else None
    source, new = Content(plain).write(tmp_path / "in"), tmp_path / "new.safetensors"
    wan_runtime.convert(source, new, target, names, rest_dtype="keep", activations=activations)
    ours = load_file(new)
    assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {
        k: (t.dtype, t.shape) for k, t in theirs.items()
    }
    for key, tensor in ours.items():
        if key.endswith("comfy_quant"):
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(theirs[key].tolist()))
        elif key.endswith(("weight_scale_2", "weight_scale")) and tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-6, atol=0)
        elif not key.endswith("input_scale"):
            # Not all: they divide in bf16 here and there, and a quotient near a half goes to the neighbouring code.
            same = tensor.view(torch.uint8) == theirs[key].view(torch.uint8)
            assert same.float().mean() > 0.9, key
