"""Opening and streaming a file: what it gives, whichever way a producer wrote it, equal to the weights meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.builders import files
from tests.builders.codes import E5M2, nearest
from tests.builders.wan import block_linears, state
from tests.reading import FIRST, QUANTISED, assert_reads, content
from wan_runtime.checkpoint import open_checkpoint, plain_dtype, read_layer, read_plain, stream
from wan_runtime.formats import FORMATS


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
