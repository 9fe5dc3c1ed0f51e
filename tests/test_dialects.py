"""Every dialect reads what its independent writer (tests/builders/files.py) wrote, and writes those same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders import files
from tests.builders.codes import tile_order
from tests.builders.writers import WRITERS
from tests.reading import CASES, FIRST, QUANTISED, assert_reads, content
from wan_runtime.checkpoint import open_checkpoint, read_layer, read_plain
from wan_runtime.containers import read_header
from wan_runtime.dialects import DIALECTS, identify
from wan_runtime.dialects._swizzle import swizzle, unswizzle
from wan_runtime.errors import CheckpointError, UnknownName
from wan_runtime.formats import FORMATS


def test_every_dialect_has_an_independent_writer() -> None:
    """A new dialect adds its writer to tests/builders/files.py; every test below then covers it."""
    assert set(WRITERS) == set(DIALECTS) - {"gguf"}  # no safetensors: tests/test_gguf.py writes its files


@pytest.mark.parametrize("name", list(DIALECTS))
def test_a_dialect_says_what_it_is(name: str) -> None:
    dialect = DIALECTS[name]
    assert dialect.name == name
    assert dialect.row and dialect.meaning
    assert set(dialect.targets.values()) <= {*FORMATS, "bf16"}


def test_a_target_of_convert_belongs_to_one_dialect() -> None:
    targets = [target for name in DIALECTS for target in DIALECTS[name].targets]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_a_file_is_recognised_and_means_what_was_written(
    tmp_path: Path, dialect: str, weight_format: str, spelling: str
) -> None:
    wanted = content(dialect, weight_format, spelling)
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    assert (checkpoint.dialect.name, checkpoint.spelling.name) == (dialect, spelling)
    assert checkpoint.evidence
    assert {layer.format for layer in checkpoint.layers.values()} <= {weight_format}
    assert_reads(checkpoint, wanted, spelling)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer."])
@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_a_prefix_changes_nothing(tmp_path: Path, dialect: str, weight_format: str, prefix: str) -> None:
    wanted = content(dialect, weight_format, prefix=prefix)
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    assert (checkpoint.dialect.name, checkpoint.prefix) == (dialect, prefix)
    assert_reads(checkpoint, wanted, prefix=prefix)


@pytest.mark.parametrize(("dialect", "weight_format"), QUANTISED)
def test_naming_the_right_dialect_reads_the_same(tmp_path: Path, dialect: str, weight_format: str) -> None:
    wanted = content(dialect, weight_format)
    assert_reads(open_checkpoint(wanted.write(tmp_path), dialect=dialect.replace("_", "-")), wanted)


@pytest.mark.parametrize(
    ("dialect", "weight_format", "named"),
    [
        (dialect, weight_format, named)
        for dialect, weight_format in QUANTISED
        for named in DIALECTS
        # The caller's word is taken.
        if weight_format != "nvfp4" or not {dialect, named} <= {"comfy", "modelopt", "modelopt_comfy"}
    ],
)
def test_naming_a_wrong_dialect_is_refused_or_means_the_same(
    tmp_path: Path, dialect: str, weight_format: str, named: str
) -> None:
    """Except where --dialect is the only thing that decides: an NVFP4 file's nibbles and layout."""
    wanted = content(dialect, weight_format)
    path = wanted.write(tmp_path)
    try:
        checkpoint = open_checkpoint(path, dialect=named)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    for module, truth in wanted.weights.items():
        if module in checkpoint.layers:
            weight = FORMATS[checkpoint.layers[module].format].dequantize(read_layer(checkpoint, module))
        else:
            weight = read_plain(checkpoint, f"{module}.weight")
        np.testing.assert_allclose(weight.double().numpy(), truth, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    ("dialect", "weight_format"), [case for case in QUANTISED if DIALECTS[case[0]].targets]
)
def test_what_a_dialect_writes_is_what_its_producer_writes(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    """Read an independent file into slots, encode the slots again, and compare with the file byte for byte."""
    wanted = content(dialect, weight_format)
    leaf = files.input_scale_leaf(dialect, weight_format)
    if leaf is not None:
        wanted.tensors[f"{FIRST}.{leaf}"] = torch.tensor(0.125)
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    for path in checkpoint.layers:
        encoded = DIALECTS[dialect].encode(weight_format, read_layer(checkpoint, path))
        theirs = {
            key.rpartition(".")[2]: t for key, t in wanted.tensors.items() if key.startswith(f"{path}.")
        }
        theirs.pop("bias")
        assert encoded.keys() == theirs.keys()
        for leaf, tensor in theirs.items():
            assert encoded[leaf].dtype == tensor.dtype and encoded[leaf].shape == tensor.shape
            assert encoded[leaf].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_an_unknown_dialect_lists_the_known_ones(tmp_path: Path) -> None:
    header = read_header(content("plain", "none").write(tmp_path))
    with pytest.raises(
        UnknownName, match=r"no dialect named 'comfyui'\. Known: comfy, comfy_.*Did you mean comfy\?"
    ):
        identify(header, "comfyui")
    with pytest.raises(UnknownName, match=r"turbodiffusion\.$"):
        identify(header, "kohya")


@pytest.mark.parametrize(("number", "cols"), [(1, 1), (64, 320), (128, 8), (130, 5), (256, 96), (300, 33)])
def test_the_tile_order_is_the_published_one(number: int, cols: int) -> None:
    """Against the offset formula, element by element; the padding is zero."""
    scales = np.random.default_rng(number).integers(1, 127, (number, cols), dtype=np.uint8)
    tiled = swizzle(torch.from_numpy(scales))
    np.testing.assert_array_equal(tiled.numpy(), tile_order(scales))
    assert unswizzle(tiled, number, cols).equal(torch.from_numpy(scales))


def test_block_scales_of_another_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"64 x 320 grid take 128 x 320 bytes; the file has shape \[64, 320\]"
    ):
        unswizzle(torch.zeros(64, 320, dtype=torch.uint8), 64, 320)


def test_the_nibbles_and_the_layout_cannot_be_told_from_shapes(tmp_path: Path) -> None:
    """Why an unmarked NVFP4 file is refused: the other reading has the same size and is far off."""
    wanted = content("comfy", "nvfp4")
    for key in [key for key in wanted.tensors if key.endswith("comfy_quant")]:
        del wanted.tensors[key]
    checkpoint = open_checkpoint(wanted.write(tmp_path), dialect="modelopt")
    for path, truth in wanted.weights.items():
        weight = FORMATS["nvfp4"].dequantize(read_layer(checkpoint, path)).double().numpy()
        assert np.linalg.norm(weight - truth) > np.linalg.norm(truth)
        assert abs(np.log(weight.std() / truth.std())) < 0.2
