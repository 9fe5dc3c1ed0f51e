"""Which dialect a file is in: marks decide, the undecidable and the unknown are refused, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders import files
from tests.builders.wan import Sizes, block_linears, state
from tests.builders.writers import WRITERS
from tests.reading import FIRST, SCALED, assert_reads, content, host, refused
from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.errors import (
    AmbiguousDialect,
    CheckpointError,
    UnknownDialect,
)

__all__ = ["host"]  # the fixture


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
FOREIGN: dict[
    str, dict[str, tuple[torch.dtype, tuple[int, ...]]]
] = {  # what else is written beside, or instead of, a layer's weight by tools that are not read
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
    assert set(error.known) == {*WRITERS, "gguf"}
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
    """It is refused, with a key that is too much or too few; or it is read as part of its layer."""
    wanted = content(dialect, weight_format)
    key = f"{FIRST}.{leaf}"
    wanted.tensors[key] = torch.ones(shape)
    path = wanted.write(tmp_path)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert key in {source.key for source in checkpoint.layers[FIRST].sources}


def test_model_optimizer_s_post_process_goes_before_every_other_mark(tmp_path: Path) -> None:
    """Its files may have ComfyUI's records or its own config.json, and never ComfyUI's nibbles."""
    for name in ("modelopt", "modelopt_comfy"):
        wanted = content(name, "nvfp4")
        wanted.metadata["quantization_config"] = '{"quant_algo": "NVFP4"}'
        wanted.metadata["_quantization_metadata"] = '{"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}'
        path = wanted.write(tmp_path / name)
        assert open_checkpoint(path).dialect.name == name
        assert_reads(open_checkpoint(path), wanted)
        assert_reads(open_checkpoint(path, dialect=name), wanted)


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


@pytest.mark.parametrize(
    ("dialect", "weight_format", "wrong"),
    [("comfy", "nvfp4", "modelopt"), ("comfy", "fp8", "comfy_scaled_fp8"), ("lightx2v", "nvfp4", "plain")],
)
def test_a_wrong_name_is_told_what_the_file_says(
    tmp_path: Path, dialect: str, weight_format: str, wrong: str
) -> None:
    path = content(dialect, weight_format).write(tmp_path)
    right = open_checkpoint(path)
    with pytest.raises(CheckpointError) as told:
        open_checkpoint(path, dialect=wrong)
    assert f"Leave --dialect (dialect=... in Python) out: the file is then read as {dialect}" in str(
        told.value
    )
    assert right.dialect.name == dialect and right.evidence.endswith(str(told.value)[:-2].rpartition("(")[2])


def test_a_right_name_of_a_damaged_file_is_not_told_to_go(tmp_path: Path) -> None:
    wanted = content("comfy", "nvfp4")
    del wanted.tensors[f"{FIRST}.weight_scale"]
    with pytest.raises(CheckpointError, match="its weight_scale is missing") as told:
        open_checkpoint(wanted.write(tmp_path), dialect="comfy")
    assert "Leave --dialect" not in str(told.value)


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_2"])
def test_a_misspelt_scale_of_an_nvfp4_layer_is_named(tmp_path: Path, leaf: str) -> None:
    wanted = content("comfy", "nvfp4")
    wrong = f"{FIRST}.{leaf.replace('scale', 'scael')}"
    wanted.tensors[wrong] = wanted.tensors.pop(f"{FIRST}.{leaf}")
    with pytest.raises(CheckpointError, match=f"its {leaf} is missing; the nearest key is '{wrong}'"):
        open_checkpoint(wanted.write(tmp_path), dialect="comfy")


def test_a_scale_that_belongs_there_is_not_named_in_the_place_of_another(tmp_path: Path) -> None:
    wanted = content("comfy", "nvfp4")
    del wanted.tensors[f"{FIRST}.weight_scale_2"]
    with pytest.raises(CheckpointError, match=r"its weight_scale_2 is missing\. Without"):
        open_checkpoint(wanted.write(tmp_path), dialect="comfy")
