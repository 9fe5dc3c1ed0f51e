"""`compare`: the seed's table by hand is now computed; causes and commands that hold when they are followed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import wan_runtime
from tests.builders import files, seed, wan
from tests.reading import QUANTISED, content
from wan_runtime.anatomy import anatomy_of
from wan_runtime.cli import app
from wan_runtime.converting import targets
from wan_runtime.errors import CheckpointError, InvalidOption

Tensors = dict[str, torch.Tensor]
LAYERS = wan.block_linears()
LAYER = "blocks.0.cross_attn.k"


@pytest.fixture(scope="module")
def state() -> Tensors:
    return wan.state()


@pytest.fixture
def working(tmp_path: Path, state: Tensors) -> Path:
    return seed.working_fp8(state, LAYERS).write(tmp_path, "working.safetensors")


@pytest.fixture
def broken(tmp_path: Path, state: Tensors) -> Path:
    return seed.broken_nvfp4(state, LAYERS).write(tmp_path, "broken.safetensors")


def test_the_seeds_two_files_give_the_seeds_table(working: Path, broken: Path) -> None:
    comparison = wan_runtime.compare(working, broken)
    assert comparison.layer == LAYER
    aspects = {name: (a, b) for name, a, b, _ in comparison.rows}
    expected = {
        "Weight dtype": ("F8_E4M3", "U8"),
        "Weight shape": ("[128, 128]", "[128, 64]"),
        "Scale names": (".scale_weight", ".weight_scale, .weight_scale_2"),
        "Scales a layer": ("1", "2"),
        "Scale shapes": ("[1]", "[128, 8], []"),
        "Scale dtypes": ("F32", "F8_E4M3, F32"),
        "Bias dtype": ("F32 x 27", "F16 x 27"),
        "Norm dtype": ("F32 x 12", "F16 x 12"),
        "Modulation dtype": ("F32 x 3", "F16 x 3"),
        "Input scale": ("none needed", "missing"),
        "Layers quantised": ("20 of 20 block Linears", "20 of 20 block Linears"),
        "Producer's marks": ("none", "none"),
        "Module names": ("original", "original"),
        # 71 tensors of the model, and 1 or 2 scales a layer.
        "Tensors": ("89", "109"),
        # 128 * 128 codes and a scale; half of that, 128 * 8 block scales and a scale.
        f"Bytes of {LAYER}": ("16,388", "9,220"),
        "File size": (f"{working.stat().st_size:,}", f"{broken.stat().st_size:,}"),
    }
    assert {name: aspects[name] for name in expected} == expected
    assert aspects["Dequantisation"][0] == "W = fp32(weight) * scale_weight"
    for said in ("even high nibble", "even low nibble", "swizzled", "plain", "[comfy]", "[modelopt]"):
        assert said in aspects["Dequantisation"][1]
    impacts = {name: impact for name, *_, impact in comparison.rows}
    assert impacts["Bias dtype"] == "3.3 decimal digits instead of 7.2"
    assert impacts[f"Bytes of {LAYER}"] == "B is 44% smaller"
    assert impacts["Module names"] == ""


def test_the_causes_name_what_a_host_would_do(working: Path, broken: Path) -> None:
    causes = "\n".join(wan_runtime.compare(working, broken).causes)
    for said in (
        "2 readings fit",
        f"would look for {LAYER}.scale_weight and not find it",
        "would leave 40 scale tensors of B unread (.weight_scale, .weight_scale_2)",
        f"packed codes for weights: {LAYER}.weight is U8 [128, 64]",
        "Norms lost precision",
        "Biases lost precision",
        "Modulation tensors lost precision",
        "no input_scale",
    ):
        assert said in causes


def test_the_weights_settle_an_undecided_file_and_the_command_given_then_works(
    working: Path, broken: Path, tmp_path: Path, state: Tensors
) -> None:
    comparison = wan_runtime.compare(working, broken, errors=True)
    right, wrong = comparison.errors["modelopt"], comparison.errors["comfy"]
    a, b = seed.working_fp8(state, LAYERS).weights, seed.broken_nvfp4(state, LAYERS).weights
    for module in LAYERS:
        exact = np.linalg.norm(a[module] - b[module]) / np.linalg.norm(a[module])
        assert right[module] == pytest.approx(exact, rel=1e-4)
        assert wrong[module] > 1
    [command] = [
        line for text in comparison.remedies for line in text.splitlines() if line.startswith("wan-runtime")
    ]
    assert "--to comfy-fp8-scaled --names original --dialect modelopt" in command
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    made = tmp_path / "broken-comfy-fp8-scaled.safetensors"
    again = wan_runtime.compare(working, made, errors=True)
    assert not any("would look for" in cause for cause in again.causes)
    assert again.remedies == ("Nothing to convert: B is in A's dialect, format and spelling.",)
    assert max(again.errors["comfy_scaled_fp8"].values()) < 0.11


def test_without_errors_the_remedy_is_to_settle_it(working: Path, broken: Path) -> None:
    remedies = wan_runtime.compare(working, broken).remedies
    assert remedies[0].endswith(f"wan-runtime compare {working} {broken} --errors")
    assert any("--reference BF16_ORIGINAL" in remedy for remedy in remedies)
    assert any("quantises a second time" in remedy for remedy in remedies)


def test_two_nvfp4_files_differ_in_order_alone(tmp_path: Path, state: Tensors) -> None:
    a = files.comfy(state, LAYERS, "nvfp4").write(tmp_path / "a")
    b = files.modelopt(state, LAYERS, "nvfp4").write(tmp_path / "b")
    comparison = wan_runtime.compare(a, b, errors=True)
    causes = "\n".join(comparison.causes)
    assert "nibble: A even high, B even low, block scales: A swizzled, B plain" in causes
    assert "none has a comfy_quant record" in causes
    assert set(comparison.errors["modelopt"].values()) == {0.0}
    assert any("--to comfy-nvfp4" in remedy for remedy in comparison.remedies)


@pytest.mark.parametrize(("dialect", "target"), [("comfy", "comfy-fp8"), ("modelopt", "modelopt-fp8")])
def test_the_target_is_the_known_files_dialect_and_spelling(
    tmp_path: Path, state: Tensors, working: Path, dialect: str, target: str
) -> None:
    spelled = wan.state(spelling="diffusers"), wan.block_linears(spelling="diffusers")
    a = files.WRITERS[dialect][0](*spelled, "fp8").write(tmp_path / "a")
    comparison = wan_runtime.compare(a, working)
    assert any(f"--to {target} --names diffusers" in remedy for remedy in comparison.remedies)
    assert any("would find none of its keys" in cause for cause in comparison.causes)


def test_a_lost_marker_and_a_plain_cast_are_named(tmp_path: Path, state: Tensors, working: Path) -> None:
    marked = files.comfy_scaled_fp8(state, LAYERS, "fp8").write(tmp_path / "marked")
    assert any(
        "scaled_fp8 marker is missing" in cause for cause in wan_runtime.compare(marked, working).causes
    )
    cast = files.plain_fp8(state, LAYERS, "fp8").write(tmp_path / "cast")
    causes = wan_runtime.compare(marked, cast).causes
    assert any("scales that do not exist" in cause for cause in causes)


def test_a_file_of_no_known_dialect_is_still_compared(tmp_path: Path, state: Tensors, working: Path) -> None:
    content = seed.broken_nvfp4(state, LAYERS)
    for module in LAYERS:
        content.tensors[f"{module}.tensor_scale"] = content.tensors.pop(f"{module}.weight_scale_2")
    comparison = wan_runtime.compare(working, content.write(tmp_path / "unknown"))
    assert ("Written by", "comfy_scaled_fp8", "unknown") in {row[:3] for row in comparison.rows}
    assert any("cannot be read with certainty" in cause for cause in comparison.causes)
    assert "unknown" in str(comparison)
    # The other way round nothing says what a host made for it reads, so no target is named.
    back = wan_runtime.compare(tmp_path / "unknown" / "model.safetensors", working)
    assert back.a.layers.keys() == set(LAYERS) and back.findings
    assert not any("--to" in finding.remedy for finding in back.findings if "--names" not in finding.remedy)


def test_different_models_are_said_to_be(tmp_path: Path, working: Path) -> None:
    other = files.Content(wan.state(wan.Sizes(dim=256, ffn=512))).write(tmp_path / "other")
    comparison = wan_runtime.compare(working, other)
    assert any("different models" in cause for cause in comparison.causes)
    with pytest.raises(InvalidOption, match="different models"):
        wan_runtime.compare(working, other, errors=True)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, working: Path, broken: Path) -> None:
    with pytest.raises(InvalidOption, match="put the known file first"):
        wan_runtime.compare(broken, working, errors=True)
    with pytest.raises(InvalidOption, match="not a block Linear of both"):
        wan_runtime.compare(working, broken, layer="blocks.7.ffn.0")
    with pytest.raises(CheckpointError, match="no such file"):
        wan_runtime.compare(working, tmp_path / "none.safetensors")


def test_text_and_json_hold_the_same(working: Path, broken: Path) -> None:
    comparison = wan_runtime.compare(working, broken)
    fields = json.loads(comparison.to_json())
    assert fields["b"]["layer"]["weight"] == {"dtype": "U8", "shape": [128, 64]}
    assert [reading["dialect"] for reading in fields["b"]["readings"]] == ["comfy", "modelopt"]
    assert fields["causes"] == list(comparison.causes)
    text = str(comparison)
    assert "F8_E4M3 [128, 128]" in text
    # A command is given on one line, to be copied.
    assert any(
        line.strip().startswith("wan-runtime convert") and "--to" in line for line in text.splitlines()
    )


@pytest.mark.parametrize(("dialect", "weight_format"), QUANTISED)
def test_every_reading_is_a_formula_of_the_file_s_own_keys(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    wanted = content(dialect, weight_format)
    [reading] = anatomy_of(wanted.write(tmp_path)).readings
    assert reading.format == weight_format and reading.formula.startswith("W = ")
    leaves = {key.rpartition(".")[2] for key in wanted.tensors}
    words = {
        word for word in re.findall(r"[a-z_0-9]+", reading.formula) if "weight" in word or "scale" in word
    }
    assert words <= leaves


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 file that `content` quantises."""
    return content("plain", "none").write(tmp_path_factory.mktemp("original"))


@pytest.mark.parametrize(("dialect", "weight_format"), QUANTISED)
def test_every_dialect_is_compared_layer_by_layer(
    original: Path, tmp_path: Path, dialect: str, weight_format: str
) -> None:
    wanted = content(dialect, weight_format)
    comparison = wan_runtime.compare(original, wanted.write(tmp_path), errors=True)
    assert comparison.b.layers.keys() == comparison.a.layers.keys() == set(LAYERS)
    assert comparison.b.quantised == len(LAYERS)
    for module, parts in comparison.b.layers.items():
        stored = {key.removeprefix(f"{module}.") for key in wanted.tensors if key.startswith(f"{module}.")}
        assert set(parts.entries) == stored and {parts.payload, *parts.scales} <= stored
        sizes = {leaf: entry.nbytes for leaf, entry in parts.entries.items()}
        assert sizes[parts.payload] == max(sizes.values())
    [errors] = comparison.errors.values()
    truth = content("plain", "none").tensors
    for module in LAYERS:
        weight = truth[f"{module}.weight"].double().numpy()
        exact = np.linalg.norm(wanted.weights[module] - weight) / np.linalg.norm(weight)
        assert errors[module] == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_gguf_and_its_conversion_are_compared(tmp_path: Path, state: Tensors) -> None:
    path = tmp_path / "wan.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    kind = gguf.GGMLQuantizationType.Q8_0
    for key, tensor in state.items():
        if key.removesuffix(".weight") in LAYERS:
            writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = tmp_path / "made.safetensors"
    wan_runtime.convert(path, made, to="comfy-fp8")
    comparison = wan_runtime.compare(path, made, errors=True)
    assert comparison.a.quantised == comparison.b.quantised == len(LAYERS)
    assert [reading.formula for reading in comparison.a.readings] == ["W = q8_0 blocks(weight)"]
    assert 0.01 < max(comparison.errors["comfy"].values()) < 0.05
    assert any("Files of gguf are read and not written" in remedy for remedy in comparison.remedies)


@pytest.mark.parametrize(("dialect", "weight_format"), QUANTISED)
def test_every_cause_has_a_remedy_and_what_is_named_in_it_exists(
    tmp_path: Path, working: Path, dialect: str, weight_format: str
) -> None:
    other = content(dialect, weight_format).write(tmp_path / "other")
    for comparison in (wan_runtime.compare(working, other), wan_runtime.compare(other, working)):
        for finding in comparison.findings:
            assert finding.cause and finding.remedy
            assert finding.remedy in re.sub(r"\s+", " ", str(comparison))
            named = re.findall(r"--to ([a-z0-9-]+)", finding.remedy)
            assert set(named) <= set(targets())


def test_a_weight_under_another_name_is_a_cause(tmp_path: Path, working: Path) -> None:
    other = content("turbodiffusion", "int8_block").write(tmp_path / "other")
    comparison = wan_runtime.compare(working, other)
    assert (".weight", ".int8_weight") in {row[1:3] for row in comparison.rows}
    [finding] = [f for f in comparison.findings if f"look for {LAYER}.weight and not" in f.cause]
    assert "--to comfy-fp8-scaled" in finding.remedy
    # What A's host reads is not written: the advice says so instead of naming a target that it does not read.
    back = wan_runtime.compare(other, working)
    assert any("Files of turbodiffusion are read and not written" in f.remedy for f in back.findings)
    assert any("--to bf16" in remedy for remedy in back.remedies)
