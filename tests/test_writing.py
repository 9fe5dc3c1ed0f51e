"""Streaming safetensors: the library reads what is written, in any order, and nothing half-written is ever seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan_runtime.containers import read_header
from wan_runtime.errors import UnaccountedTensors
from wan_runtime.writing import new_safetensors, spec_of

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip
# 53 elements a dtype: in any other order than by width, some tensors would not be aligned.
SHAPES = [(), (1,), (4,), (0,), (5, 7), (2, 3, 1, 2, 2), (0, 4)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            size = torch.Size(shape).numel() * dtype.itemsize
            high = 2 if dtype is torch.bool else 100
            raw = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
            made[f"{dtype} {shape}"] = raw.view(dtype).reshape(shape)
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("backwards", [False, True])
def test_the_library_reads_what_is_written_in_any_order(tmp_path: Path, backwards: bool) -> None:
    path, made = tmp_path / "new.safetensors", tensors()
    with new_safetensors(
        path, {k: spec_of(t) for k, t in made.items()}, {"format": "pt", "say": 'a "b"'}
    ) as write:
        for key in sorted(made, reverse=backwards):
            write(key, made[key])
    read = load_file(path)
    assert read.keys() == made.keys()
    assert all(same(read[key], tensor) for key, tensor in made.items())
    assert read_header(path).metadata == {"format": "pt", "say": 'a "b"'}


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    path, made = tmp_path / "new.safetensors", tensors()
    with new_safetensors(path, {k: spec_of(t) for k, t in made.items()}, {}) as write:
        for key, tensor in made.items():
            write(key, tensor)
    for key, entry in read_header(path).entries.items():
        assert entry.start % made[key].dtype.itemsize == 0, key


def test_strided_tensors_are_written_by_value(tmp_path: Path) -> None:
    path, transposed = tmp_path / "new.safetensors", torch.arange(12.0).reshape(3, 4).t()
    with new_safetensors(path, {"t": spec_of(transposed)}, {}) as write:
        write("t", transposed)
    assert torch.equal(load_file(path)["t"], transposed)


def test_nothing_is_there_until_everything_is(tmp_path: Path) -> None:
    path, tensor = tmp_path / "new.safetensors", torch.ones(2)
    specs = {"a": spec_of(tensor), "b": spec_of(tensor)}
    with new_safetensors(path, specs, {}) as write:
        write("a", tensor)
        assert not path.exists()
        write("b", tensor)
        assert not path.exists()
    assert path.exists()


def test_a_tensor_left_out_or_unlike_its_spec_leaves_nothing(tmp_path: Path) -> None:
    path, tensor = tmp_path / "new.safetensors", torch.ones(2)
    path.write_text("before")
    specs = {"a": spec_of(tensor), "b": spec_of(tensor)}
    with pytest.raises(UnaccountedTensors, match="b"), new_safetensors(path, specs, {}) as write:
        write("a", tensor)
    with pytest.raises(AssertionError, match="announced"), new_safetensors(path, specs, {}) as write:
        write("a", tensor.double())
    with pytest.raises(KeyError), new_safetensors(path, specs, {}) as write:
        write("a", tensor)
        write("a", tensor)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["new.safetensors"]


def test_the_header_is_plain_json_padded_to_eight_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    with new_safetensors(path, {"a": spec_of(torch.ones(3))}, {"x": "y"}) as write:
        write("a", torch.ones(3))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"x": "y"},
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
    }
    assert len(data) == 8 + length + 12
