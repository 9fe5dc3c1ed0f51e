"""Pickles: refused by name everywhere, and read as tensors alone where a caller asks for that."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from tests.builders.wan import state
from tests.reading import content
from wan_runtime.checkpoint import open_checkpoint, read_plain, stream
from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.arange(4, dtype=torch.int8),
    "none": torch.empty(0),
}


def saved(folder: Path, content: object, name: str = "model.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def refused(path: Path, *words: str, kind: type[CheckpointError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        read_header(path, pickle=True)
    for word in (*words, str(path)):
        assert word in str(caught.value)


def test_its_tensors_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, TENSORS)
    header = read_header(path, pickle=True)
    assert (header.container, header.files) == ("pickle", {path: path.stat().st_size})
    assert [key for key in header.entries if key != "none"] == ["b", "a"]
    assert (header.entries["b"].dtype, header.entries["b"].shape, header.entries["b"].nbytes) == (
        "F32",
        (2, 3),
        24,
    )
    with header.opened() as read:
        for key, tensor in TENSORS.items():
            assert read(key).equal(tensor) and header.read_tensor(key).equal(tensor)


@pytest.mark.parametrize("key", ["model", "state_dict", "generator_ema"])
def test_a_state_dict_may_be_the_only_entry(tmp_path: Path, key: str) -> None:
    inner = collections.OrderedDict((name, torch.nn.Parameter(t.float())) for name, t in TENSORS.items())
    header = read_header(saved(tmp_path, {key: inner}), pickle=True)
    assert header.entries.keys() == TENSORS.keys() and not header.read_tensor("b").requires_grad


def test_only_convert_reads_one_and_all_others_say_so(tmp_path: Path) -> None:
    path = saved(tmp_path, state(), "wan.pth")
    advice = r"`wan-runtime convert wan\.pth wan\.safetensors --to \.\.\.`"
    undecided = content("modelopt", "nvfp4")
    undecided.config = None
    target = tmp_path / "new.safetensors"
    commands: tuple[Callable[[], object], ...] = (
        lambda: wan_runtime.inspect(path),
        lambda: wan_runtime.load(path),
        lambda: wan_runtime.compare(path, path),
        lambda: open_checkpoint(path),
        lambda: wan_runtime.convert(undecided.write(tmp_path), target, "bf16", reference=path),
    )
    for command in commands:
        with pytest.raises(CheckpointError, match=r"wan\.pth: this is a pickle"):
            command()
    assert not target.exists()
    with pytest.raises(CheckpointError, match=advice):
        wan_runtime.inspect(path)


def test_convert_takes_the_tensors_out(tmp_path: Path) -> None:
    path = saved(tmp_path, {"generator_ema": {f"model.{key}": t for key, t in state().items()}})
    report = wan_runtime.convert(path, tmp_path / "wan.safetensors", "bf16")
    assert report.bytes_before == path.stat().st_size
    written = open_checkpoint(tmp_path / "wan.safetensors")
    for key, tensor in state().items():
        assert read_plain(written, key).equal(tensor.to(read_plain(written, key).dtype))
    opened = open_checkpoint(path, pickle=True)
    assert {item.path for item in stream(opened, torch.device("cpu"))} == state().keys()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    refused(saved(tmp_path, {"a": torch.zeros(2), "b": Harmful(touched)}), "weights_only=True", "refuses it")
    refused(saved(tmp_path, Harmful(touched)), "refuses it")
    for protocol in (2, 3, 4, 5):
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(Harmful(touched), protocol=protocol))
        refused(tmp_path / "bare.pth", "a bare pickle")
    refused(saved(tmp_path, TENSORS, _use_new_zipfile_serialization=False), "a bare pickle")
    assert not touched.exists()


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(8.0)}, buffer)
    whole = buffer.getvalue()
    path = tmp_path / "cut.pth"
    for size in range(2, len(whole), 61):
        path.write_bytes(whole[:size])
        refused(path)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """A million zeros take a thousand bytes: what is stored as it is cannot be larger than the file."""
    path = saved(tmp_path, {"a": torch.zeros(1_000_000)})
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    refused(packed, "compressed")


ODD: dict[str, tuple[object, tuple[str, ...]]] = {
    "a list": ([torch.zeros(1)], ("holds a list",)),
    "nothing": ({}, ("not a dictionary of tensors",)),
    "a number among tensors": ({"a": torch.zeros(1), "step": 7}, ("step (int)",)),
    "two state dicts": (
        {"ema": {"a": torch.zeros(1)}, "model": {"a": torch.zeros(1)}},
        ("ema (dict)", "model (dict)"),
    ),
    "keys that are no text": ({1: torch.zeros(1), 2: torch.zeros(1)}, ("1 (Tensor)",)),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_state_dict_is_named(tmp_path: Path, odd: str) -> None:
    content, words = ODD[odd]
    refused(saved(tmp_path, content), *words)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.arange(6).reshape(2, 3).t(), "not stored whole"),
        (torch.zeros(4).to_sparse(), "not stored whole"),
        (torch.zeros(2, dtype=torch.complex64), "not stored whole"),
        (torch.zeros(1).expand(10**9), "not stored whole"),
        (torch.empty(10**9, device="meta"), "not stored whole"),
    ],
    ids=["transposed", "sparse", "complex", "expanded", "meta"],
)
def test_a_tensor_that_is_not_in_the_file_as_it_stands_is_named(
    tmp_path: Path, tensor: torch.Tensor, problem: str
) -> None:
    refused(saved(tmp_path, {"fine": torch.zeros(1), "odd": tensor}), "'odd'", problem, kind=BadTensor)


def test_keys_that_share_their_bytes_cannot_grow_the_file(tmp_path: Path) -> None:
    one = torch.zeros(10_000)
    refused(saved(tmp_path, {f"k{n}": one for n in range(100)}), "claim more than the file's")
