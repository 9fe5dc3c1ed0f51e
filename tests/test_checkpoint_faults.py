"""Damaged and incomplete files, fault by fault: one error with its data, and the model is left as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import wan_runtime
from tests.builders import files
from tests.builders.files import Content
from tests.builders.wan import Sizes, block_linears, state
from tests.reading import FIRST, NVFP4, QUANTISED, SCALED, assert_reads, content, host, refused
from wan_runtime.checkpoint import open_checkpoint, read_layer, stream
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.formats import FORMATS

__all__ = ["host"]  # the fixture
F8, U8 = torch.float8_e4m3fn, torch.uint8


def _scale_leaves(wanted: Content, payload: str) -> list[str]:
    """What lies beside a layer's codes and bias."""
    leaves = [key.removeprefix(f"{FIRST}.") for key in wanted.tensors if key.startswith(f"{FIRST}.")]
    placeholders = ("input_scale", "output_scale")  # quanto's, of one, which its readers do not need either
    return [leaf for leaf in leaves if leaf not in (payload, "bias", *placeholders)]


@pytest.mark.parametrize(("dialect", "weight_format"), SCALED)
def test_a_missing_scale_or_record_names_its_layer(
    host: torch.nn.Module, tmp_path: Path, dialect: str, weight_format: str
) -> None:
    payload = files.payload_leaf(dialect, weight_format)
    leaves = _scale_leaves(content(dialect, weight_format), payload)
    assert leaves
    for leaf in leaves:
        wanted = content(dialect, weight_format)
        del wanted.tensors[f"{FIRST}.{leaf}"]
        error = refused(host, wanted.write(tmp_path / leaf), BadTensor, leaf)
        assert isinstance(error, BadTensor) and error.key in (f"{FIRST}.{payload}", f"{FIRST}.weight")


@pytest.mark.parametrize(("dialect", "weight_format"), SCALED)
def test_a_scale_without_a_quantised_weight_is_not_left_over(
    host: torch.nn.Module, tmp_path: Path, dialect: str, weight_format: str
) -> None:
    """Beside a norm, an unquantised Linear, and a module that is not there."""
    for module in ("blocks.0.norm3", "text_embedding.0", "blocks.0.self_attn.query"):
        wanted = content(dialect, weight_format)
        leaf = next(
            leaf
            for leaf in _scale_leaves(wanted, files.payload_leaf(dialect, weight_format))
            if "scale" in leaf
        )
        key = f"{module}.{leaf}"
        wanted.tensors[key] = torch.full_like(wanted.tensors[f"{FIRST}.{leaf}"].float(), 0.5)
        path = wanted.write(tmp_path / module)
        with pytest.raises(CheckpointError) as caught:
            wan_runtime.patch(host, path)
        assert key in str(caught.value) and str(path) in str(caught.value)
        if isinstance(caught.value, UnaccountedTensors):
            assert caught.value.unconsumed == (key,)
        else:
            assert isinstance(caught.value, BadTensor) and caught.value.key == key


def test_a_dummy_scale_of_one_beside_an_unquantised_weight_is_taken(
    host: torch.nn.Module, tmp_path: Path
) -> None:
    wanted = content("comfy_scaled_fp8", "fp8")
    wanted.tensors["text_embedding.0.scale_weight"] = torch.tensor(1.0)
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    assert "text_embedding.0.scale_weight" in checkpoint.markers
    wanted.tensors["text_embedding.0.scale_weight"] = torch.tensor(0.5)
    error = refused(host, wanted.write(tmp_path), BadTensor, "F32, not fp8", "0.5")
    assert isinstance(error, BadTensor) and error.key == "text_embedding.0.scale_weight"


SHAPES: dict[str, tuple[str, str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a weight of another size": ("comfy", "fp8", "weight", lambda t: t[:96]),
    "a weight that is a vector": ("comfy", "fp8", "weight", lambda t: t[0]),
    "a packed weight cut in width": ("modelopt", "nvfp4", "weight", lambda t: t[:, :32]),
    "a packed weight no block divides": ("modelopt", "nvfp4", "weight", lambda t: t[:, :4]),
    "a scale for half the channels": ("comfy_scaled_fp8", "fp8", "scale_weight", lambda t: t.expand(64)),
    "a scale for each input channel": ("modelopt", "fp8", "weight_scale", lambda t: t.expand(1, 128)),
    "a scale for each block": ("comfy", "fp8", "weight_scale", lambda t: t.expand(3, 2)),
    "an empty scale": ("comfy", "fp8", "weight_scale", lambda t: t.expand(0)),
    "plain block scales cut": ("modelopt", "nvfp4", "weight_scale", lambda t: t[:, :4]),
    "swizzled block scales cut": ("comfy", "nvfp4", "weight_scale", lambda t: t[:64]),
    "a global scale for each channel": ("comfy", "nvfp4", "weight_scale_2", lambda t: t.expand(128)),
    "two input scales": ("modelopt", "fp8", "input_scale", lambda t: t.expand(2)),
    "E8M0 scales": ("comfy", "fp8", "weight_scale", lambda t: torch.ones(128, 4).to(torch.float8_e8m0fnu)),
    "byte scales": ("modelopt", "fp8", "weight_scale", lambda t: torch.ones(128, 4, dtype=U8)),
    "float block scales": ("modelopt", "nvfp4", "weight_scale", lambda t: t.float()),
    "a global scale in bytes": ("comfy", "nvfp4", "weight_scale_2", lambda t: torch.ones(1, dtype=U8)),
}


@pytest.mark.parametrize("fault", SHAPES)
def test_a_weight_or_scale_of_a_wrong_shape_or_dtype_is_named(
    host: torch.nn.Module, tmp_path: Path, fault: str
) -> None:
    dialect, weight_format, leaf, damage = SHAPES[fault]
    wanted = content(dialect, weight_format)
    before = wanted.tensors.get(f"{FIRST}.{leaf}", torch.tensor(0.5))
    wanted.tensors[f"{FIRST}.{leaf}"] = damage(before)
    error = refused(host, wanted.write(tmp_path), BadTensor)
    assert isinstance(error, BadTensor) and error.key.startswith(f"{FIRST}.")


def test_a_size_that_the_format_cannot_hold_is_refused(host: torch.nn.Module, tmp_path: Path) -> None:
    """24 columns: one and a half blocks of 16."""
    wanted = content("modelopt", "nvfp4")
    for leaf, width in (("weight", 12), ("weight_scale", 1)):
        wanted.tensors[f"{FIRST}.{leaf}"] = wanted.tensors[f"{FIRST}.{leaf}"][:, :width]
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    with pytest.raises(BadTensor, match="cannot be nvfp4: in_features 24 is not a multiple of 16") as caught:
        list(stream(checkpoint, torch.device("cpu")))
    assert caught.value.key == f"{FIRST}.weight"
    refused(host, checkpoint.path, BadTensor)


def test_an_integer_weight_under_an_fp8_marker_is_what_its_dtype_says(tmp_path: Path) -> None:
    """One converter writes the scaled_fp8 marker whatever it wrote."""
    wanted = content("comfy_scaled_fp8", "fp8")
    codes = np.random.default_rng(0).integers(-128, 128, (128, 128), dtype=np.int8)
    wanted.tensors[f"{FIRST}.weight"] = torch.from_numpy(codes)
    wanted.tensors[f"{FIRST}.scale_weight"] = torch.full((1,), 0.0025)
    wanted.weights[FIRST] = codes.astype(np.float64) * float(np.float32(0.0025))
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    assert checkpoint.layers[FIRST].format == "int8"
    assert_reads(checkpoint, wanted)


def test_block_scales_that_count_as_many_as_the_channels_are_no_row_scales(tmp_path: Path) -> None:
    """64 x 64 blocks of [128, 4096] are 2 x 64 = 128 scales, as many as one an output channel would be."""
    scales = np.random.default_rng(0).uniform(1e-4, 1e-3, (2, 64)).astype(np.float32)
    for dialect, leaf in (("comfy", "weight_scale"), ("comfy_scaled_fp8", "scale_weight")):
        writer = files.WRITERS[dialect][0]
        wanted = writer(state(Sizes(text=4096)), ["text_embedding.0", *block_linears()], "fp8")
        before = wanted.tensors[f"text_embedding.0.{leaf}"].double().item()
        wanted.tensors[f"text_embedding.0.{leaf}"] = torch.from_numpy(scales)
        checkpoint = open_checkpoint(wanted.write(tmp_path / dialect))
        layer = checkpoint.layers["text_embedding.0"]
        assert layer.format == "fp8_block"
        weight = FORMATS["fp8_block"].dequantize(read_layer(checkpoint, "text_embedding.0"))
        each = scales.astype(np.float64)[np.arange(128)[:, None] // 64, np.arange(4096) // 64]
        truth = wanted.weights["text_embedding.0"] / before * each
        np.testing.assert_allclose(weight.double().numpy(), truth, rtol=2**-22, atol=0)
        wanted.tensors[f"text_embedding.0.{leaf}"] = torch.from_numpy(scales).reshape(64, 2)
        checkpoint = open_checkpoint(wanted.write(tmp_path / dialect))
        with pytest.raises(BadTensor, match=r"slot scale needs .*\[64, 2\]") as caught:
            list(stream(checkpoint, torch.device("cpu")))
        assert caught.value.key == f"text_embedding.0.{leaf}"


SCALES = {"NaN": float("nan"), "infinite": float("inf"), "negative": -0.5, "zero": 0.0}
FLOAT_SCALED = [case for case in SCALED if files.float_scale_leaf(*case) is not None]


@pytest.mark.parametrize("damage", SCALES)
@pytest.mark.parametrize(("dialect", "weight_format"), FLOAT_SCALED)
def test_a_damaged_scale_is_named(
    host: torch.nn.Module, tmp_path: Path, dialect: str, weight_format: str, damage: str
) -> None:
    wanted = content(dialect, weight_format)
    key = f"blocks.1.ffn.2.{files.float_scale_leaf(dialect, weight_format)}"
    wanted.tensors[key] = torch.full_like(wanted.tensors[key], SCALES[damage])
    error = refused(host, wanted.write(tmp_path), BadTensor, damage)
    assert isinstance(error, BadTensor) and error.key == key


@pytest.mark.parametrize(
    ("code", "word"), [(0x7F, "NaN"), (0x81, "negative"), (0x00, "zero beside non-zero")]
)
@pytest.mark.parametrize(("dialect", "weight_format"), NVFP4)
def test_a_damaged_block_scale_is_named(
    host: torch.nn.Module, tmp_path: Path, dialect: str, weight_format: str, code: int, word: str
) -> None:
    wanted = content(dialect, weight_format)
    key = f"{FIRST}.{'_weight_scale' if dialect == 'torchao' else 'weight_scale'}"
    bytes_ = wanted.tensors[key].view(U8).clone()
    bytes_[5, 3] = code
    wanted.tensors[key] = bytes_.view(F8)
    error = refused(host, wanted.write(tmp_path), BadTensor, word)
    assert isinstance(error, BadTensor) and error.key == key


@pytest.mark.parametrize("damage", ["NaN", "infinite", "negative", "zero"])
def test_a_damaged_input_scale_is_named(host: torch.nn.Module, tmp_path: Path, damage: str) -> None:
    wanted = content("modelopt", "fp8")
    wanted.tensors[f"{FIRST}.input_scale"] = torch.tensor(SCALES[damage])
    error = refused(host, wanted.write(tmp_path), BadTensor, "input scale must be positive")
    assert isinstance(error, BadTensor) and error.key == f"{FIRST}.input_scale"


@pytest.mark.parametrize(
    ("dialect", "weight_format"), [case for case in QUANTISED if "fp8" in case[1]]
)  # of the others every code is a number
def test_a_nan_code_is_named(host: torch.nn.Module, tmp_path: Path, dialect: str, weight_format: str) -> None:
    wanted = content(dialect, weight_format)
    key = f"{FIRST}.{files.payload_leaf(dialect, weight_format)}"
    codes = wanted.tensors[key].view(U8).clone()
    codes[3, 4] = 0xFF
    wanted.tensors[key] = codes.view(wanted.tensors[key].dtype)
    error = refused(host, wanted.write(tmp_path), BadTensor, "codes in 1 of its 128 rows are NaN")
    assert isinstance(error, BadTensor) and error.key == key


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_damaged_plain_tensor_is_named(host: torch.nn.Module, tmp_path: Path, value: str) -> None:
    for key in ("blocks.0.norm3.bias", "head.modulation", "time_embedding.0.weight"):
        wanted = content("comfy", "fp8")
        wanted.tensors[key] = torch.full_like(wanted.tensors[key], float(value)).bfloat16()
        error = refused(host, wanted.write(tmp_path / key), BadTensor, "NaN or infinite")
        assert isinstance(error, BadTensor) and error.key == key


@pytest.mark.parametrize("weight_format", ["fp8", "fp8_e5m2"])
def test_scaled_codes_that_lost_their_scales_are_no_plain_cast(
    host: torch.nn.Module, tmp_path: Path, weight_format: str
) -> None:
    wanted = content("comfy_scaled_fp8", weight_format)
    wanted.tensors = {key: t for key, t in wanted.tensors.items() if "scale" not in key}
    error = refused(host, wanted.write(tmp_path), BadTensor, "lost their scales")
    assert isinstance(error, BadTensor) and error.key.endswith(".weight")


def test_a_module_that_is_there_twice_is_named(host: torch.nn.Module, tmp_path: Path) -> None:
    twins = {"blocks.1.attn2.to_k.weight": "two spellings", "net.blocks.1.ffn.0.weight": "two prefixes"}
    for key, words in twins.items():
        wanted = content("comfy_scaled_fp8", "fp8")
        wanted.tensors[key] = torch.zeros(128, 128)
        error = refused(host, wanted.write(tmp_path / words), BadTensor, words)
        assert isinstance(error, BadTensor) and error.key == key
    outside = content("plain", "none", prefix="model.")
    outside.tensors["head.head.weight"] = torch.zeros(64, 128)
    error = refused(host, outside.write(tmp_path / "head"), BadTensor, "in the file twice")
    assert isinstance(error, BadTensor) and error.key.endswith("head.head.weight")
    linears = ["model.head.head", *block_linears(prefix="model.")]
    quantised = files.comfy_scaled_fp8(state(prefix="model."), linears, "fp8")
    quantised.tensors["head.head.weight"] = torch.zeros(64, 128)
    error = refused(
        host, quantised.write(tmp_path / "quantised"), BadTensor, "in the file twice", "model.head.head"
    )
    assert isinstance(error, BadTensor) and error.key == "head.head.weight"


# Comfy's records.

RECORDS: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"format": "nv', "not valid JSON"),
    "not UTF-8": (b'{"format": "nvfp4\xff"}', "not UTF-8"),
    "a list": (b'["nvfp4"]', "not a JSON object"),
    "empty": (b"", "not valid JSON"),
    "nested too deep": (b"[" * 60_000, "not valid JSON"),
    "too long": (b" " * 70_000 + b"{}", "is U8 text"),
    "a rotation": (b'{"format": "nvfp4", "convrot": true}', "asks for convrot"),
    "a rotation in params": (b'{"format": "nvfp4", "params": {"convrot": true}}', "asks for convrot"),
    "params that are no object": (b'{"format": "nvfp4", "params": [1]}', "asks for params"),
    "another format": (b'{"format": "mxfp8"}', "MXFP8 block scales are"),
    "a format that nobody has": (b'{"format": "nvfp5"}', "format 'nvfp5'"),
    "no format": (b"{}", "format None"),
    "a format of another weight": (b'{"format": "float8_e4m3fn"}', "weight_scale"),
    "other blocks": (b'{"format": "nvfp4", "group_size": 32}', "group_size 32"),
    "a padded weight": (b'{"format": "nvfp4", "orig_shape": [120, 128]}', "orig_shape [120, 128]"),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_that_is_not_understood_is_refused(
    host: torch.nn.Module, tmp_path: Path, damage: str
) -> None:
    text, word = RECORDS[damage]
    wanted = content("comfy", "nvfp4")
    wanted.tensors[f"{FIRST}.comfy_quant"] = torch.tensor(list(text), dtype=U8)
    error = refused(host, wanted.write(tmp_path), BadTensor, word)
    assert isinstance(error, BadTensor) and error.key.startswith(FIRST)


def test_a_record_that_is_no_text_or_has_no_layer_is_refused(host: torch.nn.Module, tmp_path: Path) -> None:
    wanted = content("comfy", "fp8")
    wanted.tensors[f"{FIRST}.comfy_quant"] = torch.zeros(4)
    refused(host, wanted.write(tmp_path), BadTensor, "is U8 text", "F32")
    wanted = content("comfy", "fp8")
    record = wanted.tensors[f"{FIRST}.comfy_quant"]
    wanted.tensors["blocks.7.ffn.0.comfy_quant"] = record
    error = refused(host, wanted.write(tmp_path), BadTensor, "has no weight in the file")
    assert isinstance(error, BadTensor) and error.key == "blocks.7.ffn.0.comfy_quant"


HEADERS = {
    "cut": ('{"layers": ', "not valid JSON"),
    "no layers": ('{"format_version": "1.0"}', "names no layers"),
    "layers that are a list": ('{"layers": ["nvfp4"]}', "names no layers"),
    "a layer that is not there": ('{"layers": {"blocks.9.ffn.0": "nvfp4"}}', "0 weights of the file match"),
    "part of a name": ('{"layers": {"ffn.0": "nvfp4"}}', "0 weights of the file match"),
    "a layer twice": ('{"layers": {"blocks.0.ffn.0": "nvfp4", "net.blocks.0.ffn.0": "nvfp4"}}', "twice"),
    "a record that is none": ('{"layers": {"blocks.0.ffn.0": 3}}', "which is no record"),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_header_records_that_are_not_understood_are_refused(
    host: torch.nn.Module, tmp_path: Path, damage: str
) -> None:
    text, word = HEADERS[damage]
    wanted = content("comfy", "nvfp4")
    wanted.tensors = {k: t for k, t in wanted.tensors.items() if not k.endswith("comfy_quant")}
    wanted.metadata["_quantization_metadata"] = text
    with pytest.raises(CheckpointError, match=word):
        wan_runtime.patch(host, wanted.write(tmp_path))


def test_two_records_of_one_layer_must_agree(host: torch.nn.Module, tmp_path: Path) -> None:
    wanted = content("comfy", "nvfp4")
    layers = {module: {"format": "nvfp4"} for module in wanted.weights} | {FIRST: {"format": "mxfp8"}}
    wanted.metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    error = refused(host, wanted.write(tmp_path), BadTensor, "'nvfp4'", "'mxfp8'")
    assert isinstance(error, BadTensor) and error.key == f"{FIRST}.comfy_quant"


# The file against the model.


def test_a_truncated_file_leaves_the_model_as_it_was(host: torch.nn.Module, tmp_path: Path) -> None:
    path = content("comfy", "nvfp4").write(tmp_path)
    whole = path.read_bytes()
    for size in (len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(host, path, BadTensor, "cut short")


def test_tensors_that_no_slot_takes_and_slots_that_no_tensor_fills_are_listed(
    host: torch.nn.Module, tmp_path: Path
) -> None:
    wanted = content("modelopt", "nvfp4")
    wanted.tensors["ref_conv.bias"] = wanted.tensors.pop("blocks.1.norm3.bias")
    error = refused(host, wanted.write(tmp_path), UnaccountedTensors, "ref_conv.bias", "blocks.1.norm2.bias")
    assert isinstance(error, UnaccountedTensors)
    assert (error.unconsumed, error.unfilled) == (("ref_conv.bias",), ("blocks.1.norm2.bias",))


@pytest.mark.parametrize("sizes", [Sizes(layers=3), Sizes(layers=1), Sizes(channels=36, image=64)])
def test_a_model_of_other_parts_is_refused(host: torch.nn.Module, tmp_path: Path, sizes: Sizes) -> None:
    wanted = files.comfy(state(sizes), block_linears(Sizes(layers=1)), "fp8")
    refused(host, wanted.write(tmp_path), UnaccountedTensors, "is the model one too")


def test_a_model_of_other_widths_is_refused(host: torch.nn.Module, tmp_path: Path) -> None:
    wanted = files.modelopt(state(Sizes(ffn=512)), block_linears(), "nvfp4")
    refused(host, wanted.write(tmp_path), BadTensor, "512", "256")


def test_load_builds_nothing_from_a_damaged_file(tmp_path: Path) -> None:
    wanted = content("comfy_scaled_fp8", "fp8")
    wanted.tensors["blocks.1.ffn.2.scale_weight"] = torch.tensor([-1.0])
    with pytest.raises(BadTensor, match="negative"):
        wan_runtime.load(wanted.write(tmp_path), device="cpu")
