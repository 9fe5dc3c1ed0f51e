"""Sharded sets as their own libraries write them, and each way in which shards and index can disagree."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from tests.builders.wan import state
from tests.reading import FIRST, content
from wan_runtime.checkpoint import open_checkpoint, read_layer, stream
from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors

INDEX = "model.safetensors.index.json"
TENSORS = {f"t{n}": torch.arange(n * 10.0, n * 10 + 6).reshape(2, 3) for n in range(5)}


def sharded(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, size: int = 50) -> Path:
    """The set as huggingface_hub writes it, in shards of two tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=size)
    assert (folder / INDEX).is_file() and len(list(folder.glob("*.safetensors"))) > 1
    return folder


def shard(number: int, count: int = 3) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    fields = json.loads((folder / INDEX).read_text())
    change(fields)
    (folder / INDEX).write_text(json.dumps(fields))


def refused(path: Path, *words: str, kind: type[CheckpointError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        read_header(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["", INDEX, shard(1), shard(3)])
def test_a_set_is_found_by_its_folder_index_or_any_shard(tmp_path: Path, name: str) -> None:
    header = read_header(sharded(tmp_path) / name)
    assert (header.path, header.container) == (tmp_path / INDEX, "sharded")
    assert list(header.files.values()) == [p.stat().st_size for p in sorted(tmp_path.glob("*.safetensors"))]
    assert header.nbytes == sum(header.files.values())
    with header.opened() as read:
        for key, tensor in TENSORS.items():
            assert header.read_tensor(key).equal(tensor) and read(key).equal(tensor)
    places = [(entry.file.name, entry.start) for entry in header.entries.values()]
    assert places == sorted(places) and header.entries.keys() == TENSORS.keys()


def test_a_set_without_its_index_is_complete_by_its_names(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).unlink()
    for path in (tmp_path, tmp_path / shard(2)):
        header = read_header(path)
        assert header.path == tmp_path / shard(1) and header.entries.keys() == TENSORS.keys()
    (tmp_path / shard(1)).unlink()
    refused(tmp_path, "1 of its 3 files are missing", shard(1))


def test_what_the_hub_writes_into_the_index_is_metadata(tmp_path: Path) -> None:
    save_torch_state_dict(TENSORS, tmp_path, max_shard_size=50, metadata={"quantization_config": "{}"})
    assert read_header(tmp_path).metadata == {"quantization_config": "{}", "format": "pt"}


def test_links_to_shards_are_followed_and_their_own_names_count(tmp_path: Path) -> None:
    """The hub's cache: a folder of links to files that are named by their hash."""
    sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        path.rename(tmp_path / "blobs" / f"{number:064x}")
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..", "blobs", f"{number:064x}"))
    for name in ("", INDEX, shard(2)):
        header = read_header(tmp_path / "snapshot" / name)
        assert header.read_tensor("t4").equal(TENSORS["t4"])
    (tmp_path / "blobs" / f"{1:064x}").unlink()
    refused(tmp_path / "snapshot", "1 of its 3 files are missing", shard(2))
    refused(tmp_path / "snapshot" / shard(2), "it is a link to", "where there is nothing")


def _drop(folder: Path, *numbers: int) -> None:
    for number in numbers:
        (folder / shard(number)).unlink()


def _swap(folder: Path) -> None:
    one, two = folder / shard(1), folder / shard(2)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def _add(folder: Path, number: int, **tensors: torch.Tensor) -> None:
    path = folder / shard(number)
    save_file({**load_file(path), **tensors}, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[CheckpointError], tuple[str, ...]]] = {
    "a shard is missing": (
        lambda f: _drop(f, 2),
        CheckpointError,
        ("1 of its 3 files", shard(2)),
    ),
    "two are missing": (
        lambda f: _drop(f, 1, 3),
        CheckpointError,
        ("2 of its 3 files", shard(1), shard(3)),
    ),
    "a shard is cut": (
        lambda f: (f / shard(2)).write_bytes((f / shard(2)).read_bytes()[:-4]),
        BadTensor,
        (shard(2), "cut short"),
    ),
    "a shard is an older one": (
        lambda f: save_file({"t2": TENSORS["t2"]}, f / shard(2)),
        UnaccountedTensors,
        (INDEX, f"t3 (in {shard(2)})", "not filled"),
    ),
    "a key in two shards": (
        lambda f: _add(f, 3, t0=TENSORS["t0"]),
        BadTensor,
        ("'t0'", f"in {shard(1)} and in {shard(3)} too"),
    ),
    "a key that the index lacks": (
        lambda f: _add(f, 3, t9=TENSORS["t0"]),
        UnaccountedTensors,
        (f"t9 (in {shard(3)})", "The index does not list them"),
    ),
    "shards renamed into each other": (
        _swap,
        BadTensor,
        ("the index puts it into", f"and it is in {shard(1)}"),
    ),
    "another total": (
        lambda f: edit(f, lambda i: i["metadata"].update(total_size=121)),
        CheckpointError,
        ("total_size 121", "have 120 bytes"),
    ),
    "a total that is no number": (
        lambda f: edit(f, lambda i: i["metadata"].update(total_size="much")),
        CheckpointError,
        ("total_size much",),
    ),
    "a shard that the index forgets": (
        lambda f: edit(f, lambda i: [i["weight_map"].pop(key) for key in ("t2", "t3")]),
        CheckpointError,
        ("lists no tensor in", shard(2)),
    ),
    "no map": (lambda f: edit(f, lambda i: i.pop("weight_map")), CheckpointError, ("has no weight_map",)),
    "a map of something else": (
        lambda f: edit(f, lambda i: i["weight_map"].update(t0=3)),
        BadTensor,
        ("'t0'", "puts it into '3'"),
    ),
    "a file elsewhere": (
        lambda f: edit(f, lambda i: i["weight_map"].update(t0="../model.safetensors")),
        BadTensor,
        ("'t0'", "not a .safetensors file beside the index"),
    ),
    "no JSON": (lambda f: (f / INDEX).write_text('{"weight_map": {'), CheckpointError, ("not valid JSON",)),
    "a key twice in the index": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"t0": "a.safetensors", "t0": "b.safetensors"}}'),
        CheckpointError,
        ("'t0' is there twice",),
    ),
    "no object": (lambda f: (f / INDEX).write_text("[1]"), CheckpointError, ("no weight_map",)),
}


@pytest.mark.parametrize("name", ["", INDEX])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_set_that_contradicts_its_index_is_refused(tmp_path: Path, damage: str, name: str) -> None:
    change, kind, words = DAMAGE[damage]
    change(sharded(tmp_path))
    refused(tmp_path / name, *words, kind=kind)


def test_an_index_may_lack_a_total_or_give_the_files_sizes(tmp_path: Path) -> None:
    """LightX2V's converter sums the files, and for a single file it writes an index of nothing."""
    sharded(tmp_path)
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for metadata in ({"total_size": whole}, {}, {"total_size": 120.0}):
        edit(tmp_path, functools.partial(dict.update, metadata=metadata))
        assert read_header(tmp_path).entries.keys() == TENSORS.keys()
    single = tmp_path / "single"
    single.mkdir()
    save_file(TENSORS, single / "converted.safetensors")
    (single / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": {}})
    )
    assert read_header(single).path == single / "converted.safetensors"
    refused(single / "diffusion_pytorch_model.safetensors.index.json", "lists no tensor")


def test_two_sets_or_a_set_and_a_file_are_ambiguous(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    refused(tmp_path, "holds 2 checkpoints", "lora.safetensors (one file)", f"{INDEX} (a set of shards)")
    assert read_header(tmp_path / "lora.safetensors").entries.keys() == {"a"}
    assert read_header(tmp_path / INDEX).entries.keys() == TENSORS.keys()
    (tmp_path / "lora.safetensors").unlink()
    (tmp_path / "old.safetensors.index.json").write_text((tmp_path / INDEX).read_text())
    refused(tmp_path, "holds 2 checkpoints", "old.safetensors.index.json")
    refused(tmp_path / shard(1), "belongs to 2 checkpoints")


def test_shards_whose_metadata_describe_their_own_tensors_are_joined(tmp_path: Path) -> None:
    one = {"layers": {"a": {"format": "nvfp4"}}, "format_version": "1.0"}
    two = {"layers": {"b": {"format": "nvfp4"}}, "format_version": "1.0"}
    for number, (fields, names) in enumerate(((one, ["a"]), (two, ["b", "a"])), 1):
        save_file(
            {f"k{number}": torch.zeros(1)},
            tmp_path / shard(number, 2),
            {"_quantization_metadata": json.dumps(fields), "tensor_names": json.dumps(names)},
        )
    found = {name: json.loads(text) for name, text in read_header(tmp_path).metadata.items()}
    assert found["_quantization_metadata"]["layers"] == {"a": {"format": "nvfp4"}, "b": {"format": "nvfp4"}}
    assert found["tensor_names"] == ["a", "b"]
    for text in ('{"layers": {"a": {"format": "fp8"}}, "format_version": "1.0"}', "other"):
        save_file({"k2": torch.zeros(1)}, tmp_path / shard(2, 2), {"_quantization_metadata": text})
        refused(tmp_path, "disagree on the metadata '_quantization_metadata'", shard(2, 2))


@pytest.mark.parametrize(
    ("dialect", "weight_format"), [("comfy", "nvfp4"), ("comfy_scaled_fp8", "fp8"), ("modelopt", "nvfp4")]
)
def test_a_layer_across_two_shards_is_read_as_from_one_file(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    """Some weight and its scale fall into different shards."""
    wanted = content(dialect, weight_format)
    whole = open_checkpoint(wanted.write(tmp_path / "whole"))
    parts = tmp_path / "parts"
    save_torch_state_dict_of(wanted.tensors, wanted.metadata, parts)
    if wanted.config is not None:
        (parts / "config.json").write_text(json.dumps(wanted.config))
    checkpoint = open_checkpoint(parts)
    assert (checkpoint.dialect.name, checkpoint.variant) == (whole.dialect.name, whole.variant)
    entries = checkpoint.header.entries
    files = [{entries[s.key].file for s in layer.sources} for layer in checkpoint.layers.values()]
    assert any(len(owners) > 1 for owners in files)
    for path in whole.layers:
        one, two = read_layer(whole, path), read_layer(checkpoint, path)
        assert one.keys() == two.keys() and all(one[slot].equal(two[slot]) for slot in one)
    seen = {item.path: item.slots for item in stream(checkpoint, torch.device("cpu"))}
    assert seen.keys() == {*whole.layers, *whole.plain}
    assert seen[FIRST]["payload"].equal(read_layer(whole, FIRST)["payload"])


def save_torch_state_dict_of(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], folder: Path
) -> None:
    """As huggingface_hub splits it; its layers' scales come after all weights."""
    folder.mkdir()
    ordered = dict(sorted(tensors.items(), key=lambda item: item[0].rpartition(".")[2]))
    save_torch_state_dict(ordered, folder, max_shard_size=100_000, metadata=metadata)


def test_diffusers_own_shards_are_read(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    model.load_state_dict(state(spelling="diffusers"))
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path.name == "diffusion_pytorch_model.safetensors.index.json"
    assert checkpoint.header.config["_class_name"] == "WanTransformer3DModel"
    loaded = {item.path: item.slots["tensor"] for item in stream(checkpoint, torch.device("cpu"))}
    originals = state()
    assert loaded.keys() == originals.keys()
    assert all(loaded[path].equal(tensor) for path, tensor in originals.items())
