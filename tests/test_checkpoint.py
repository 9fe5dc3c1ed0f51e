"""Opening and streaming a file: each fault is named with its data, and nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.codes import E5M2, nearest
from tests.builders.wan import TINY, Sizes, block_linears, state
from tests.test_dialects import assert_reads, content
from wan_runtime.checkpoint import open_checkpoint, plain_dtype, read_layer, read_plain, stream
from wan_runtime.errors import (
    AmbiguousDialect,
    BadTensor,
    CheckpointError,
    UnaccountedTensors,
    UnknownDialect,
)
from wan_runtime.formats import FORMATS

FIRST = "blocks.0.self_attn.q"
QUANTISED = [(d, f) for d, (_, formats) in files.WRITERS.items() for f in formats if f != "none"]
SCALED = [case for case in QUANTISED if case[0] != "plain_fp8"]
NVFP4 = [case for case in QUANTISED if case[1] == "nvfp4"]


@pytest.fixture(scope="module")
def host() -> Iterator[torch.nn.Module]:
    """A stock diffusers model of the tiny size; every test must leave it exactly as it was."""
    from diffusers import WanTransformer3DModel

    model: torch.nn.Module = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    yield model
    after = model.state_dict()
    assert after.keys() == before.keys() and all(after[key].equal(before[key]) for key in before)
    assert [type(module) for module in model.modules()] == types


def refused(
    host: torch.nn.Module,
    path: Path,
    kind: type[CheckpointError],
    *words: str,
    dialect: str | None = None,
) -> CheckpointError:
    """The file is refused by `patch` with one error that says all this; the `host` fixture checks it is untouched."""
    with pytest.raises(CheckpointError) as caught:
        wan_runtime.patch(host, path, dialect=dialect)
    assert type(caught.value) is kind, caught.value
    for word in (*words, str(path)):
        assert word in str(caught.value)
    assert caught.value.path == path
    return caught.value


# What opening a file gives.


def test_a_checkpoint_describes_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(content("modelopt", "nvfp4", "diffusers").write(tmp_path))
    assert (checkpoint.variant.dim, checkpoint.variant.layers, checkpoint.spelling.name) == (
        128,
        2,
        "diffusers",
    )
    assert checkpoint.shape_of(f"{FIRST}.weight") == (128, 128)
    assert checkpoint.shape_of("blocks.0.ffn.0.weight") == (256, 128)
    assert checkpoint.shape_of("blocks.0.norm3.bias") == (128,)
    assert plain_dtype(checkpoint, "blocks.0.norm3.bias") is torch.float32


@pytest.mark.parametrize(("dialect", "weight_format"), QUANTISED)
def test_streaming_gives_every_layer_and_tensor_once(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    checkpoint = open_checkpoint(content(dialect, weight_format).write(tmp_path))
    seen = {item.path: item for item in stream(checkpoint, torch.device("cpu"))}
    assert len(list(stream(checkpoint, torch.device("cpu")))) == len(seen)
    assert seen.keys() == {*checkpoint.layers, *checkpoint.plain}
    for path, item in seen.items():
        if item.format is None:
            assert item.slots["tensor"].equal(read_plain(checkpoint, path))
            continue
        slots = read_layer(checkpoint, path)
        assert item.format == weight_format and item.slots.keys() == slots.keys()
        assert all(item.slots[name].equal(slots[name]) for name in slots)


def test_input_scales_come_with_their_layer(tmp_path: Path) -> None:
    for dialect, weight_format, leaf in (
        ("comfy", "nvfp4", "input_scale"),
        ("modelopt", "fp8", "input_scale"),
        ("comfy_scaled_fp8", "fp8", "scale_input"),
    ):
        wanted = content(dialect, weight_format)
        wanted.tensors[f"{FIRST}.{leaf}"] = torch.tensor(0.125)
        checkpoint = open_checkpoint(wanted.write(tmp_path / dialect))
        assert read_layer(checkpoint, FIRST)["input_scale"].tolist() == [[0.125]]
        assert "input_scale" not in read_layer(checkpoint, "blocks.0.self_attn.k")


def test_comfy_records_may_lie_in_the_header(tmp_path: Path) -> None:
    """With the file's prefix, without it, with one the file has not, as bare strings, and beside the tensors."""
    forms = {
        "with": ("model.diffusion_model.", "model.diffusion_model.", {"format": "nvfp4"}),
        "without": ("model.diffusion_model.", "", {"format": "nvfp4"}),
        "added": ("", "model.diffusion_model.", {"format": "nvfp4"}),
        "bare": ("", "", "nvfp4"),
        "nested": ("", "", {"format": "nvfp4", "params": {"group_size": 16, "orig_dtype": "torch.bfloat16"}}),
    }
    for name, (prefix, named, record) in forms.items():
        wanted = content("comfy", "nvfp4", prefix=prefix)
        layers = {named + module.removeprefix(prefix): record for module in wanted.weights}
        wanted.metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
        assert_reads(open_checkpoint(wanted.write(tmp_path / f"{name} both")), wanted, prefix=prefix)
        wanted.tensors = {k: t for k, t in wanted.tensors.items() if not k.endswith("comfy_quant")}
        checkpoint = open_checkpoint(wanted.write(tmp_path / name))
        assert checkpoint.dialect.name == "comfy" and not checkpoint.markers
        assert_reads(checkpoint, wanted, prefix=prefix)


def test_the_weight_s_own_dtype_decides_and_not_the_marker(tmp_path: Path) -> None:
    comfy = content("comfy", "fp8_e5m2")
    record = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    comfy.tensors |= {f"{module}.comfy_quant": record for module in comfy.weights}
    scaled = content("comfy_scaled_fp8", "fp8_e5m2")
    for marker in (torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(1), torch.zeros(0)):
        scaled.tensors["scaled_fp8"] = marker
        for name, wanted in (("comfy", comfy), ("scaled", scaled)):
            checkpoint = open_checkpoint(wanted.write(tmp_path / name))
            assert {layer.format for layer in checkpoint.layers.values()} == {"fp8_e5m2"}
            assert_reads(checkpoint, wanted)


def test_comfy_codes_stored_as_bytes_have_the_record_s_format(tmp_path: Path) -> None:
    for weight_format in ("fp8", "fp8_e5m2"):
        wanted = content("comfy", weight_format)
        for module in wanted.weights:
            wanted.tensors[f"{module}.weight"] = wanted.tensors[f"{module}.weight"].view(torch.uint8)
        assert_reads(open_checkpoint(wanted.write(tmp_path / weight_format)), wanted)


def test_a_scale_for_each_output_channel_is_read(tmp_path: Path) -> None:
    modules = block_linears()
    wanted = files.comfy_scaled_fp8(state(), modules, "fp8", per_row=True)
    assert_reads(open_checkpoint(wanted.write(tmp_path / "scaled")), wanted)
    flat = files.comfy_scaled_fp8(state(), modules, "fp8", per_row=True)
    for module in modules:  # LightX2V has [out, 1] under original names, convert_to_quant [out]
        flat.tensors[f"{module}.weight_scale"] = flat.tensors.pop(f"{module}.scale_weight").flatten()
    del flat.tensors["scaled_fp8"]
    assert_reads(open_checkpoint(flat.write(tmp_path / "flat")), flat)


def test_scales_that_put_the_codes_between_minus_one_and_one(tmp_path: Path) -> None:
    """A recipe in use: scale = amax, no marker; the product is the same."""
    wanted = content("comfy_scaled_fp8", "fp8")
    del wanted.tensors["scaled_fp8"]
    for module in wanted.weights:
        codes = wanted.tensors[f"{module}.weight"].float()
        amax = codes.abs().amax()
        wanted.tensors[f"{module}.weight"] = (codes / amax).to(torch.float8_e4m3fn)
        meant = wanted.tensors[f"{module}.weight"].double().numpy()
        scale = (wanted.tensors[f"{module}.scale_weight"] * amax).reshape(())
        wanted.tensors[f"{module}.scale_weight"] = scale
        wanted.weights[module] = meant * scale.item()
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    assert "no 'scaled_fp8' marker" in checkpoint.evidence
    assert_reads(checkpoint, wanted)


def test_a_plain_cast_of_everything_gives_fp32_norms_and_biases(tmp_path: Path) -> None:
    wanted = content("plain", "none")
    tensors = {
        key: files.codes_as(nearest(t.double().numpy(), E5M2), torch.float8_e5m2)
        for key, t in wanted.tensors.items()
    }
    path = files.Content(tensors).write(tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.dialect.name == "plain_fp8"
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2:
            read = FORMATS["fp8_e5m2"].dequantize(read_layer(checkpoint, module))
        else:
            read = read_plain(checkpoint, key)
        assert read.dtype is torch.float32 and read.equal(tensor.float())


def test_our_own_marker_decides(tmp_path: Path) -> None:
    wanted = content("modelopt", "nvfp4")
    wanted.config = None
    wanted.metadata["wan_runtime"] = json.dumps({"dialect": "modelopt"})
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    assert "'wan_runtime' marker" in checkpoint.evidence
    assert_reads(checkpoint, wanted)


# Which dialect: undecidable, unknown, other tools' files.


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize("dialect", ["comfy", "modelopt"])
def test_an_unmarked_nvfp4_file_is_refused_until_someone_decides(
    host: torch.nn.Module, tmp_path: Path, dialect: str, spelling: str
) -> None:
    """Diffusers names alone are no mark. --dialect decides, and so does the file the weights were made from."""
    wanted = content(dialect, "nvfp4", spelling)
    wanted.config = None
    wanted.tensors = {k: t for k, t in wanted.tensors.items() if not k.endswith("comfy_quant")}
    path = wanted.write(tmp_path)
    words = (
        "--dialect comfy",
        "--dialect modelopt",
        "--reference",
        "high nibble",
        "low nibble",
        "swizzled",
        "plain",
    )
    error = refused(host, path, AmbiguousDialect, *words)
    assert isinstance(error, AmbiguousDialect) and error.candidates.keys() == {"comfy", "modelopt"}
    assert_reads(open_checkpoint(path, dialect=dialect), wanted, spelling)
    bf16 = {key: tensor.bfloat16() for key, tensor in state(spelling="original").items()}
    reference = files.Content(bf16).write(tmp_path / "reference")
    settled = open_checkpoint(path, reference=reference)
    assert settled.dialect.name == dialect and reference.name in settled.evidence
    assert_reads(settled, wanted, spelling)


def test_a_reference_of_other_weights_is_refused(tmp_path: Path) -> None:
    wanted = content("comfy", "nvfp4")
    wanted.tensors = {k: t for k, t in wanted.tensors.items() if not k.endswith("comfy_quant")}
    path = wanted.write(tmp_path)
    other = files.Content(state(seed=1)).write(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no reading is close to .*comfy 1\.\d+, modelopt 1\.\d+"):
        open_checkpoint(path, reference=other)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state().items()}
    with pytest.raises(CheckpointError, match="no reading is close"):
        open_checkpoint(path, reference=files.Content(zeros).write(tmp_path / "zeros"))
    with pytest.raises(CheckpointError, match="none of the quantised layers unquantised"):
        open_checkpoint(path, reference=content("comfy", "fp8").write(tmp_path / "fp8"))
    wider = files.Content(state(Sizes(dim=256))).write(tmp_path / "wider")
    with pytest.raises(CheckpointError, match=r"has shape \[256, 256\], not \[128, 128\]"):
        open_checkpoint(path, reference=wider)


F8, U8, I8 = torch.float8_e4m3fn, torch.uint8, torch.int8
FOREIGN = {  # what else is written beside, or instead of, a layer's weight by tools that are not read
    "quanto": {"weight._data": (I8, (128, 128)), "weight._scale": (torch.bfloat16, (128, 1))},
    "torchao": {"_weight_qdata": (F8, (128, 128)), "_weight_scale": (torch.float32, (128, 1))},
    "LightX2V nvfp4, released": {
        "weight": (U8, (128, 64)),
        "weight_scale": (F8, (128, 8)),
        "alpha": (torch.float32, ()),
        "input_global_scale": (torch.float32, ()),
    },
    "LightX2V nvfp4, raw": {
        "weight": (U8, (128, 64)),
        "weight_scale": (F8, (128, 8)),
        "weight_global_scale": (torch.float32, ()),
    },
    "LightX2V mxfp8": {"weight": (U8, (128, 128)), "weight_scale": (torch.float8_e8m0fnu, (128, 4))},
    "LightX2V int8": {"weight": (I8, (128, 128)), "weight_scale": (torch.float32, (128, 1))},
    "compressed-tensors nvfp4": {
        "weight_packed": (U8, (128, 64)),
        "weight_scale": (F8, (128, 8)),
        "weight_global_scale": (torch.float32, ()),
    },
    "TurboDiffusion": {"int8_weight": (I8, (128, 128)), "scale": (torch.float32, (1, 1))},
    "nunchaku": {"qweight": (I8, (128, 64)), "wscales": (torch.bfloat16, (2, 128))},
    "bitsandbytes": {"weight": (U8, (8192, 1)), "weight.absmax": (torch.float32, (256,))},
    "DeepSeek's blocks": {"weight": (F8, (128, 128)), "weight_scale_inv": (torch.float32, (1, 1))},
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_the_file_of_a_tool_that_is_not_read_is_unknown(
    host: torch.nn.Module, tmp_path: Path, tool: str
) -> None:
    tensors = state()
    for module in block_linears():
        del tensors[f"{module}.weight"]
        for leaf, (dtype, shape) in FOREIGN[tool].items():
            tensors[f"{module}.{leaf}"] = torch.ones(shape).to(dtype)
    error = refused(host, files.Content(tensors).write(tmp_path), UnknownDialect, "--dialect", "convert")
    assert isinstance(error, UnknownDialect)
    assert set(error.known) == set(files.WRITERS)
    assert all(
        f".{leaf.rpartition('.')[2]} x 20" in error.found for leaf in FOREIGN[tool] if leaf != "weight"
    )


@pytest.mark.parametrize(
    ("leaf", "shape"),
    [
        ("pre_quant_scale", (128,)),
        ("svdquant_lora_a", (4, 128)),
        ("weight_scalar", ()),
        ("scale_weight_tensor", (1,)),
        ("weight_quantizer._amax", ()),
        ("alpha", ()),
    ],
)
@pytest.mark.parametrize(("dialect", "weight_format"), SCALED)
def test_a_tensor_that_changes_a_weight_s_meaning_is_not_left_out(
    tmp_path: Path, dialect: str, weight_format: str, leaf: str, shape: tuple[int, ...]
) -> None:
    wanted = content(dialect, weight_format)
    wanted.tensors[f"{FIRST}.{leaf}"] = torch.ones(shape)
    with pytest.raises((UnaccountedTensors, UnknownDialect)) as caught:
        open_checkpoint(wanted.write(tmp_path))
    assert leaf.rpartition(".")[2] in str(caught.value)


def test_model_optimizer_s_post_processed_nvfp4_is_refused_until_named(
    host: torch.nn.Module, tmp_path: Path
) -> None:
    for dialect in ("modelopt", "comfy"):
        wanted = content(dialect, "nvfp4")
        wanted.metadata["quantization_config"] = '{"quant_algo": "NVFP4"}'
        path = wanted.write(tmp_path / dialect)
        refused(host, path, CheckpointError, "quantization_config", "swizzled or plain", "--dialect modelopt")
    wanted = content("modelopt", "nvfp4")
    wanted.metadata["quantization_config"] = '{"quant_algo": "NVFP4"}'
    assert_reads(open_checkpoint(wanted.write(tmp_path), dialect="modelopt"), wanted)


OWN = {
    "cut": '{"dialect": ',
    "no dialect": '{"version": 1}',
    "not an object": "3",
    "not a name": '{"dialect": ["comfy"]}',
    "null": '{"dialect": null}',
    "newer": '{"dialect": "int3_of_the_future"}',
}


@pytest.mark.parametrize("damage", OWN)
def test_our_own_marker_damaged_is_refused(host: torch.nn.Module, tmp_path: Path, damage: str) -> None:
    wanted = content("comfy", "fp8")
    wanted.metadata["wan_runtime"] = OWN[damage]
    refused(host, wanted.write(tmp_path), CheckpointError, "'wan_runtime' marker", "--dialect")
    assert_reads(open_checkpoint(tmp_path, dialect="comfy"), wanted)


def test_a_text_encoder_or_a_lora_is_no_transformer(host: torch.nn.Module, tmp_path: Path) -> None:
    encoder = {
        "shared.weight": torch.zeros(8, 4),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4).to(F8),
        "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(()),
        "scaled_fp8": torch.zeros(0, dtype=F8),
        "spiece_model": torch.zeros(9, dtype=U8),
    }
    refused(
        host,
        files.Content(encoder).write(tmp_path / "t5"),
        CheckpointError,
        "not a WAN transformer",
        "text encoder",
    )
    lora = {f"diffusion_model.{FIRST}.lora_{end}.weight": torch.zeros(4, 4) for end in ("A", "B")}
    refused(
        host, files.Content(lora).write(tmp_path / "lora"), CheckpointError, "is a LoRA", "load_lora_weights"
    )
