"""Every command takes every container, and finds in it what it finds in one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import wan_runtime
from tests.builders.wan import state
from tests.containers.test_blocks import by_block
from tests.reading import content
from wan_runtime.checkpoint import open_checkpoint, read_layer
from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError, InvalidOption

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def _shards(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size=300_000)
    assert (folder / INDEX).is_file()
    return folder


def _index(folder: Path, tensors: Tensors) -> Path:
    return _shards(folder, tensors) / INDEX


def _shard(folder: Path, tensors: Tensors) -> Path:
    return sorted(_shards(folder, tensors).glob("*.safetensors"))[1]


def _without_index(folder: Path, tensors: Tensors) -> Path:
    _index(folder, tensors).unlink()
    return folder


def _pipeline(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    _shards(folder / "transformer", tensors)
    return folder


KINDS: dict[str, Callable[[Path, Tensors], Path]] = {
    "shards": _shards,
    "an index": _index,
    "one shard": _shard,
    "shards without an index": _without_index,
    "blocks": by_block,
    "a pipeline": _pipeline,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_reads_it_as_one_file(tmp_path: Path, kind: str) -> None:
    wanted = content("comfy", "nvfp4")
    one = wanted.write(tmp_path / "one")
    given = KINDS[kind](tmp_path / "parts", wanted.tensors)
    whole, found = wan_runtime.inspect(one), wan_runtime.inspect(given)
    for name in ("variant", "dialect", "evidence", "formats", "kept", "tensors"):
        assert getattr(found, name) == getattr(whole, name)
    parts = list((tmp_path / "parts").rglob("*.safetensors"))
    assert found.bytes == sum(path.stat().st_size for path in parts)

    models = [wan_runtime.load(path, device="cpu", dtype=torch.float32) for path in (one, given)]
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)

    for path, name in ((one, "from_one"), (given, "from_parts")):
        report = wan_runtime.convert(path, tmp_path / f"{name}.safetensors", "modelopt-nvfp4")
        assert report.bytes_before == wan_runtime.inspect(path).bytes
    made = [load_file(tmp_path / f"{name}.safetensors") for name in ("from_one", "from_parts")]
    assert made[0].keys() == made[1].keys() and all(made[0][key].equal(made[1][key]) for key in made[0])

    compared = wan_runtime.compare(one, given, errors=True)
    assert set(compared.errors["comfy"].values()) == {0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_it_settles_an_undecided_file_as_its_reference(tmp_path: Path, kind: str) -> None:
    undecided = content("modelopt", "nvfp4")
    undecided.config = None
    path = undecided.write(tmp_path)
    base = KINDS[kind](tmp_path / "parts", state())
    assert open_checkpoint(path, reference=base).dialect.name == "modelopt"


def test_no_file_of_the_source_is_overwritten(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "parts", content("comfy", "nvfp4").tensors)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link.safetensors").symlink_to(sorted(folder.glob("*.safetensors"))[0])
    for target in (*sorted(folder.glob("*.safetensors")), tmp_path / "link.safetensors"):
        with pytest.raises(InvalidOption, match="is being read"):
            wan_runtime.convert(folder, target, "bf16")
    with pytest.raises(InvalidOption, match="must end in"):
        wan_runtime.convert(folder, folder, "bf16")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_conversion_that_finds_a_late_shard_damaged_leaves_nothing(tmp_path: Path) -> None:
    tensors = content("plain", "none").tensors
    folder = _shards(tmp_path / "parts", tensors)
    last = sorted(folder.glob("*.safetensors"))[-1]
    entry = next(e for e in read_header(folder).entries.values() if e.file == last and e.dtype == "F32")
    damaged = bytearray(last.read_bytes())
    damaged[entry.start : entry.start + 4] = b"\x00\x00\xc0\x7f"  # NaN
    last.write_bytes(damaged)
    target = tmp_path / "new.safetensors"
    target.write_bytes(b"an older one")
    with pytest.raises(BadTensor, match="NaN"):
        wan_runtime.convert(folder, target, "bf16")
    assert target.read_bytes() == b"an older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.safetensors", "parts"]


def test_layers_are_read_from_the_files_that_their_tensors_are_in(tmp_path: Path) -> None:
    wanted = content("comfy_scaled_fp8", "fp8")
    one = open_checkpoint(wanted.write(tmp_path / "one"))
    several = open_checkpoint(by_block(tmp_path / "parts", wanted.tensors))
    for path in one.layers:
        first, second = read_layer(one, path), read_layer(several, path)
        assert first.keys() == second.keys() and all(first[slot].equal(second[slot]) for slot in first)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "x", "../x"])
maps = st.dictionaries(st.sampled_from(["a", "b", "c"]), names | json_values, max_size=4)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.fixed_dictionaries({"weight_map": maps | json_values, "metadata": json_values}) | json_values)
def test_any_index_is_read_or_refused(tmp_path: Path, fields: object) -> None:
    """Only our own errors, whatever JSON an index is."""
    save_torch_state_dict({"a": torch.zeros(8), "b": torch.ones(8)}, tmp_path, max_shard_size=40)
    (tmp_path / INDEX).write_text(json.dumps(fields))
    for path in (tmp_path, tmp_path / INDEX, tmp_path / "model-00001-of-00002.safetensors"):
        try:
            assert read_header(path).entries.keys() == {"a", "b"}
        except CheckpointError:
            continue
