"""A file for each block, as LightX2V's converter writes them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders.wan import Sizes, state
from tests.reading import content
from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError

LAYERS = 12  # more than ten: block_10 comes after block_9
STATE = {key: torch.zeros(2) for key in state(Sizes(layers=LAYERS))}


def by_block(folder: Path, tensors: dict[str, torch.Tensor] = STATE, *, index: bool = False) -> Path:
    """The grouping of LightX2V's tools/convert/converter.py, written anew; with its index, whose total is of files."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = re.search(r"blocks\.(\d+)\.", key)
        groups[f"block_{match[1]}" if match else "non_block"][key] = tensor.contiguous()
    weight_map: dict[str, str] = {}
    total = 0
    for name, group in groups.items():
        path = folder / f"{name}.safetensors"
        save_file(group, path)
        weight_map |= dict.fromkeys(group, path.name)
        total += path.stat().st_size
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    return folder


def refused(path: Path, *words: str, kind: type[CheckpointError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        read_header(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["", "block_3.safetensors", "non_block.safetensors"])
@pytest.mark.parametrize("index", [False, True])
def test_a_folder_of_blocks_is_one_checkpoint(tmp_path: Path, index: bool, name: str) -> None:
    header = read_header(by_block(tmp_path, index=index) / name)
    assert header.entries.keys() == STATE.keys()
    assert len(header.files) == LAYERS + 1
    assert header.container == ("sharded" if index else "blocks")
    assert header.path == (tmp_path / "diffusion_pytorch_model.safetensors.index.json" if index else tmp_path)


def test_its_files_are_read_in_the_order_of_the_blocks(tmp_path: Path) -> None:
    names = [path.name for path in read_header(by_block(tmp_path)).files]
    assert names == [*(f"block_{n}.safetensors" for n in range(LAYERS)), "non_block.safetensors"]


@pytest.mark.parametrize("gone", ["block_0", "block_5", "non_block"])
def test_a_missing_file_is_named(tmp_path: Path, gone: str) -> None:
    (by_block(tmp_path) / f"{gone}.safetensors").unlink()
    refused(tmp_path, f"{gone}.safetensors", "missing")


def test_a_missing_last_block_is_seen_when_the_model_is_known(tmp_path: Path) -> None:
    """No name in the folder says how many blocks there are: a model of 12 layers does."""
    import wan_runtime

    tensors = content("plain", "none", "diffusers").tensors
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    (by_block(tmp_path, tensors) / "block_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"slots of the model were not filled.*blocks\.1\."):
        wan_runtime.patch(model, tmp_path, weights="keep")


def test_blocks_that_were_renamed_or_copied_are_refused(tmp_path: Path) -> None:
    by_block(tmp_path)
    one, two = tmp_path / "block_1.safetensors", tmp_path / "block_2.safetensors"
    content_of_one = one.read_bytes()
    one.write_bytes(two.read_bytes())
    refused(
        tmp_path, "'blocks.2.", "it is in block_1.safetensors and in block_2.safetensors too", kind=BadTensor
    )
    two.write_bytes(content_of_one)
    refused(tmp_path, "'blocks.2.", "it is in block_1.safetensors, which is another block's", kind=BadTensor)
    by_block(tmp_path)
    rest = tmp_path / "non_block.safetensors"
    extra = {"blocks.0.self_attn.more": torch.zeros(1)}
    save_file({**load_file(rest), **extra}, rest)
    refused(tmp_path, "it is in non_block.safetensors, which is another block's", kind=BadTensor)


def test_what_feeds_a_block_lies_in_its_file(tmp_path: Path) -> None:
    """The converter's pattern finds "blocks.0." in "vace_blocks.0." too."""
    tensors = {**STATE, "vace_blocks.0.before_proj.weight": torch.zeros(1)}
    header = read_header(by_block(tmp_path, tensors))
    assert header.entries["vace_blocks.0.before_proj.weight"].file.name == "block_0.safetensors"


def test_a_file_that_is_no_block_s_is_another_checkpoint(tmp_path: Path) -> None:
    by_block(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "vae.safetensors")
    refused(tmp_path, "holds 2 checkpoints", "vae.safetensors (one file)", "a file for each block")
    assert read_header(tmp_path / "vae.safetensors").entries.keys() == {"a"}


@pytest.mark.parametrize(("dialect", "weight_format"), [("comfy_scaled_fp8", "fp8"), ("modelopt", "fp8")])
def test_a_quantised_model_in_blocks_is_read(tmp_path: Path, dialect: str, weight_format: str) -> None:
    wanted = content(dialect, weight_format)
    by_block(tmp_path, wanted.tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.variant.layers == 2 and len(checkpoint.layers) == len(wanted.weights)
