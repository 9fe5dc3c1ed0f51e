"""The layout and the nibble test answer on trained weights, and on random ones they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.codes import tile_order
from tests.builders.files import Content, modelopt
from tests.builders.wan import Sizes, block_linears, state
from tests.faults.kinds import File, mislay, swap_nibbles
from tests.faults.trained import trained
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.containers import read_header
from wan_runtime.deciding import decide
from wan_runtime.dialects import DIALECTS
from wan_runtime.errors import AmbiguousDialect, CheckpointError
from wan_runtime.evidence import layout_test, nibble_test, read_layouts

E4M3 = torch.float8_e4m3fn


def _load(path: Path, dialect: str | None = None) -> None:
    for _ in stream(open_checkpoint(path, dialect=dialect), torch.device("cpu")):
        pass


def _scales(content: Content) -> list[torch.Tensor]:
    return [tensor for key, tensor in content.tensors.items() if key.endswith("weight_scale")]


def _tiled(scales: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(tile_order(scales.view(torch.uint8).numpy())).view(scales.dtype)


def test_trained_block_scales_show_their_order() -> None:
    plain = _scales(trained("modelopt", "nvfp4"))
    assert layout_test(plain).answer == "plain"
    assert layout_test([_tiled(scales) for scales in plain]).answer == "swizzled"


def test_layers_whose_shape_shows_the_order_are_not_asked() -> None:
    assert layout_test([torch.ones(64, 20).to(E4M3), torch.ones(128, 6).to(E4M3)]).answer is None


@pytest.mark.parametrize("seed", range(5))
def test_independent_weights_give_no_answer(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = Sizes(dim=256, ffn=512, layers=1)
    tensors = {
        key: 0.03 * torch.randn(tensor.shape, generator=generator) for key, tensor in state(sizes).items()
    }
    content = modelopt(tensors, block_linears(sizes), "nvfp4")
    assert layout_test(_scales(content)).answer is None
    header = read_header(content.write(tmp_path))
    layers = DIALECTS["modelopt"].read(header).layers
    assert nibble_test(header, layers).answer is None and read_layouts(header, layers).answer is None


def test_block_scales_of_one_value_or_none_give_no_answer() -> None:
    assert layout_test([]).answer is None
    assert layout_test([torch.full((128, 16), 2.0).to(E4M3)]).answer is None


@pytest.mark.parametrize("dialect", ["comfy", "modelopt", "lightx2v", "compressed_tensors", "torchao"])
def test_nibbles_are_found_right_and_swapped(tmp_path: Path, dialect: str) -> None:
    content = trained(dialect, "nvfp4")
    [swapped] = swap_nibbles(File(content, dialect, "nvfp4"))
    for held, answer in ((content, "right"), (swapped, "swapped")):
        header = read_header(held.write(tmp_path / answer))
        finding = nibble_test(header, DIALECTS[dialect].read(header).layers)
        assert (finding.answer, finding.wide) == (answer, True), finding.words


@pytest.mark.parametrize("dialect", ["comfy", "modelopt"])
def test_marks_that_the_weights_contradict_are_refused_with_both_facts(tmp_path: Path, dialect: str) -> None:
    content = trained(dialect, "nvfp4")
    mark = {"comfy": "comfy_quant record", "modelopt": "config.json says modelopt"}[dialect]
    faults = {"nibble test": swap_nibbles, "layout test": mislay}
    for test, fault in faults.items():
        [damaged] = fault(File(content, dialect, "nvfp4"))
        path = damaged.write(tmp_path / test)
        with pytest.raises(CheckpointError, match=test) as caught:
            _load(path)
        assert mark in str(caught.value) and f"--dialect {dialect}" in str(caught.value)
        assert "--reference" in str(caught.value)
        _load(path, dialect)  # the caller insists


def test_an_unmarked_file_is_told_what_its_weights_suggest(tmp_path: Path) -> None:
    for dialect, layout, nibble in (("modelopt", "plain", "low"), ("comfy", "swizzled", "high")):
        content = trained(dialect, "nvfp4")
        kept = {key: t for key, t in content.tensors.items() if not key.endswith("comfy_quant")}
        header = read_header(Content(kept).write(tmp_path / dialect))
        with pytest.raises(
            AmbiguousDialect, match=f"layout test says {layout}.*{nibble} nibble.*decides nothing alone"
        ):
            decide(header)


def test_model_optimizer_s_postprocess_is_decided_by_the_layout(tmp_path: Path) -> None:
    for dialect in ("modelopt", "modelopt_comfy"):
        content = trained(dialect, "nvfp4")
        metadata = {
            "quantization_config": "{}",
            "_quantization_metadata": '{"layers": {"blocks.0.ffn.0": "nvfp4"}}',
        }
        path = Content(content.tensors, content.weights, metadata).write(tmp_path / dialect)
        checkpoint = open_checkpoint(path)
        assert checkpoint.dialect.name == dialect
        assert "quantization_config" in checkpoint.evidence and "layout test" in checkpoint.evidence
        _load(path)


def test_without_signal_the_postprocess_is_left_to_the_caller(tmp_path: Path) -> None:
    sizes = Sizes(dim=256, ffn=512, layers=1)
    generator = torch.Generator().manual_seed(0)
    tensors = {k: 0.03 * torch.randn(t.shape, generator=generator) for k, t in state(sizes).items()}
    content = modelopt(tensors, block_linears(sizes), "nvfp4")
    path = Content(content.tensors, content.weights, {"quantization_config": "{}"}).write(tmp_path)
    with pytest.raises(AmbiguousDialect, match="no answer") as caught:
        open_checkpoint(path)
    assert caught.value.candidates.keys() == {"modelopt", "modelopt_comfy"}
    assert open_checkpoint(path, dialect="modelopt").dialect.name == "modelopt"


@pytest.mark.parametrize("rows", [64, 192])
def test_a_layer_whose_rows_128_does_not_divide_shows_the_layout(tmp_path: Path, rows: int) -> None:
    """As a quantised head does: [64, 16] scales plain, [128, 16] swizzled."""
    weights = {"plain": (rows, 16), "swizzled": (-(-rows // 128) * 128, 16)}
    base = state(Sizes(dim=256, layers=1))
    for layout, shape in weights.items():
        tensors = dict(base)
        tensors["head.head.weight"] = torch.zeros(rows, 128, dtype=torch.uint8)
        tensors["head.head.weight_scale"] = torch.ones(shape).to(E4M3)
        tensors["head.head.weight_scale_2"] = torch.tensor(0.01)
        header = read_header(
            Content(tensors, metadata={"quantization_config": "{}"}).write(tmp_path / layout)
        )
        chosen, because = decide(header)
        assert chosen.name == {"plain": "modelopt", "swizzled": "modelopt_comfy"}[layout]
        assert layout in because


def test_padded_scales_are_trimmed_and_must_be_zero(tmp_path: Path) -> None:
    """`padding_strategy="row_col"` widens 8 columns of scales to 16."""
    sizes = Sizes(dim=128, layers=1)
    for dialect in ("modelopt", "modelopt_comfy"):
        content = modelopt(state(sizes), block_linears(sizes), "nvfp4")
        for key in [key for key in content.tensors if key.endswith("weight_scale")]:
            bytes_ = content.tensors[key].view(torch.uint8).numpy()
            wide = np.pad(bytes_, ((0, 0), (0, -bytes_.shape[1] % 16)))
            laid = tile_order(wide) if dialect == "modelopt_comfy" else wide
            content.tensors[key] = torch.from_numpy(laid).view(E4M3)
        path = Content(content.tensors, metadata={"quantization_config": "{}"}).write(tmp_path / dialect)
        _load(path, dialect)
        key = "blocks.0.self_attn.q.weight_scale"
        spoilt = content.tensors[key].view(torch.uint8).clone()
        spoilt[:] = 0x38
        content.tensors[key] = spoilt.view(E4M3)
        with pytest.raises(CheckpointError, match="the others are not zero"):
            _load(Content(content.tensors).write(tmp_path / "spoilt"), dialect)
