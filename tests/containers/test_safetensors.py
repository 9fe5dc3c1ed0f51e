"""The header: what it says of a good file, and each way in which a file may be cut, foreign or lying."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import DTYPES, SPELLINGS


def _raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path = folder / "raw.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _file(folder: Path, entries: object, data: bytes = bytes(8)) -> Path:
    return _raw(folder, json.dumps(entries).encode(), data)


def _refused(path: Path, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value.path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_tensor_of_each_dtype_comes_back_as_the_library_wrote_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(dtype)
    tensors = {
        "a": tensor,
        "b": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1).to(dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"who": "me"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"who": "me"}
    assert header.entries.keys() == tensors.keys()
    assert header.entries["a"].dtype == SPELLINGS[dtype]
    for key, wanted in tensors.items():
        read = header.read_tensor(key)
        assert read.dtype == wanted.dtype and read.shape == wanted.shape
        assert read.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))


def test_entries_are_in_the_file_s_own_order(tmp_path: Path) -> None:
    path = _file(tmp_path, {"late": _entry(offsets=(8, 16)), "early": _entry()}, bytes(16))
    assert list(read_header(path).entries) == ["early", "late"]


@pytest.mark.parametrize("length", [640, 0x4B50, 896, 1152])
def test_a_header_whose_length_starts_like_a_pickle_or_an_archive_is_read(
    tmp_path: Path, length: int
) -> None:
    """640 is written 80 02, the start of a pickle; 0x4B50 is written "PK"."""
    header = json.dumps({"a": _entry()}).encode().ljust(length)
    assert list(read_header(_raw(tmp_path, header, bytes(8))).entries) == ["a"]


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read_header(str(tmp_path)).path == tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    _refused(tmp_path, "holds 2 checkpoints", "model.safetensors", "model-2.safetensors", "Name the one")


def test_a_config_of_a_diffusers_model_lies_beside_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, {"a": _entry()})
    assert read_header(path).config == {}
    (tmp_path / "config.json").write_text('{"sizes": 3}')
    assert read_header(path).config == {}  # some other tool's
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert read_header(path).config == {"_class_name": "WanTransformer3DModel"}
    (tmp_path / "config.json").write_text('{"_class_name": ')
    with pytest.raises(CheckpointError, match=r"config\.json.*not valid JSON"):
        read_header(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere.safetensors", "there is no such file")


def test_pickles_are_named_and_never_opened(tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (touched,))

    for protocol in (2, 3, 4, 5):
        path = tmp_path / "model.pth"
        path.write_bytes(pickle.dumps(Harmful(), protocol=protocol))
        _refused(path, "pickle", "only safetensors")
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    _refused(tmp_path / "model.pt", "pickle")
    assert not touched.exists()


@pytest.mark.parametrize("size", range(10))
def test_a_file_too_short_for_a_header_says_its_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    _refused(path, f"has {size} bytes")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save({"a": torch.arange(5.0), "b": torch.arange(7, dtype=torch.uint8)}, {"k": "v"})
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        _refused(path)
    path.write_bytes(whole + b"\0")
    _refused(path, "1 bytes follow the last tensor")


@pytest.mark.parametrize("claimed", [99_999_999, 2**40, 2**64 - 1])
def test_a_header_that_claims_more_than_the_file_costs_no_memory(tmp_path: Path, claimed: int) -> None:
    path = _raw(tmp_path, b'{"a":', length=claimed)
    tracemalloc.start()
    try:
        _refused(path, f"claims {claimed} bytes", "cut short")
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read_gives_no_zeros(tmp_path: Path) -> None:
    path = _file(tmp_path, {"a": _entry()}, b"\x01" * 8)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadTensor, match="became shorter") as caught:
        header.read_tensor("a")
    assert caught.value.key == "a"


LIES: dict[str, tuple[dict[str, object], str]] = {
    "past the end": (_entry(shape=(3,), offsets=(0, 12)), "the file is cut short"),
    "backwards": (_entry(offsets=(8, 0)), "cut short"),
    "negative": (_entry(offsets=(-8, 0)), "cut short"),
    "too few bytes for the shape": (_entry(shape=(3,)), "needs 12 bytes and has 8"),
    "a gap before it": (_entry(shape=(1,), offsets=(4, 8)), "does not tile"),
    "an unknown dtype": (_entry(dtype="F3"), "dtype 'F3' is not known"),
    "a negative size": (_entry(shape=(-2, -1)), "its shape"),
    "a fractional size": (_entry(shape=(2.0,)), "its shape"),
    "a boolean size": (_entry(shape=(True, 2)), "its shape"),
    "an empty tensor of absurd size": (_entry(shape=(0, 2**62, 2**62), offsets=(0, 0)), "its shape"),
    "a hundred dimensions": (_entry(shape=(1,) * 100 + (2,)), "its shape"),
    "no shape": ({"dtype": "F32", "data_offsets": (0, 8)}, "malformed"),
    "another field": ({**_entry(), "stride": 1}, "malformed"),
    "one offset": (_entry(offsets=(0,)), "malformed"),
    "offsets as text": (_entry(offsets=("0", "8")), "malformed"),
    "a dtype that is no text": (_entry(dtype=3), "malformed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_entry_that_lies_is_named(tmp_path: Path, lie: str) -> None:
    entry, word = LIES[lie]
    error = _refused(_file(tmp_path, {"model.a": entry}), word)
    assert isinstance(error, BadTensor) and error.key == "model.a"


def test_an_entry_that_is_no_object_is_named(tmp_path: Path) -> None:
    for value in (None, 3, "F32", [1, 2]):
        error = _refused(_file(tmp_path, {"model.a": value}), "malformed")
        assert isinstance(error, BadTensor) and error.key == "model.a"


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    error = _refused(_file(tmp_path, {"a": _entry(), "b": _entry()}), "does not tile")
    assert isinstance(error, BadTensor) and error.key == "b"


def test_bytes_that_no_tensor_covers_are_refused(tmp_path: Path) -> None:
    _refused(_file(tmp_path, {"a": _entry()}, bytes(11)), "3 bytes follow the last tensor")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b'{"a": ', "not valid JSON"),
        (b'{"a": \xff}  ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2, 3]", "not a JSON object"),
        (b'"header"    ', "not a JSON object"),
        (b'{"__metadata__": {"a": 1}}', "strings to strings"),
        (b'{"__metadata__": [1]}', "strings to strings"),
    ],
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, text: bytes, word: str) -> None:
    _refused(_raw(tmp_path, text), word)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """JSON readers keep the last one: an e4m3 tensor would become e5m2 without a word."""
    one = json.dumps(_entry("F8_E4M3", [8]))
    two = json.dumps(_entry("F8_E5M2", [8]))
    _refused(
        _raw(tmp_path, f'{{"blocks.0": {one}, "blocks.0": {two}}}'.encode(), bytes(8)),
        "'blocks.0' is there twice",
    )


def _read_or_refuse(path: Path) -> None:
    """Only our own errors, and no more memory than the file is worth."""
    tracemalloc.start()
    try:
        header = read_header(path)
    except CheckpointError:
        return
    else:
        for key in header.entries:
            header.read_tensor(key)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000 + 50 * path.stat().st_size


fuzz = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-3, 2**65) | st.integers(0, 16)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
    }
)


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    _read_or_refuse(path)


@fuzz
@given(st.dictionaries(st.text(max_size=12), entries | json_values, max_size=4), st.binary(max_size=64))
def test_any_json_header_is_read_or_refused(tmp_path: Path, fields: dict[str, Any], data: bytes) -> None:
    _read_or_refuse(_raw(tmp_path, json.dumps(fields).encode(), data))


@fuzz
@given(st.data())
def test_a_good_file_with_damaged_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(
        save({"a": torch.arange(5.0), "b": torch.zeros(3, dtype=torch.float8_e4m3fn)}, {"k": "v"})
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    _read_or_refuse(path)


def test_a_header_of_no_bytes_does_not_read_the_file(tmp_path: Path) -> None:
    path = _raw(tmp_path, b"", bytes(4_000_000), length=0)
    tracemalloc.start()
    try:
        _refused(path, "claims 0 bytes")
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
