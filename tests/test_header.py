"""Reading the tensors that a header describes, one by one or from mapped files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "codes": torch.arange(7.0).to(torch.float8_e4m3fn),
    "matrix": torch.arange(6.0).reshape(2, 3),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
}


def test_mapped_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    with header.opened() as read:
        mapped = {key: read(key) for key in header.entries}
    for key, wanted in TENSORS.items():  # after the reader has closed
        for read_one in (mapped[key], header.read_tensor(key)):
            assert read_one.dtype == wanted.dtype and read_one.shape == wanted.shape
            assert read_one.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("shift", range(8))
def test_tensors_that_are_not_aligned_are_read(tmp_path: Path, shift: int) -> None:
    """The header's length decides where data begins, and not every writer pads it."""
    whole = save({"a": torch.arange(6.0), "b": torch.arange(3, dtype=torch.int64)})
    length = struct.unpack("<Q", whole[:8])[0]
    head = whole[8 : 8 + length] + b" " * shift
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + whole[8 + length :])
    with read_header(path).opened() as read:
        assert read("a").tolist() == [0, 1, 2, 3, 4, 5] and read("b").tolist() == [0, 1, 2]
        assert read("a").sum().item() == 15


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    with read_header(path).opened() as read:
        read("a").zero_()
    assert path.read_bytes() == before


def test_a_file_that_changed_since_its_header_was_read_is_not_mapped(tmp_path: Path) -> None:
    """Reading a mapping past the file's end would kill the process."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4000)}, path)
    header = read_header(path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8])
    with (
        header.opened() as read,
        pytest.raises(CheckpointError, match=f"had {size} bytes .* has {size - 8} now"),
    ):
        read("a")
    with pytest.raises(BadTensor, match="became shorter"):
        header.read_tensor("a")
    path.unlink()
    with header.opened() as read, pytest.raises(CheckpointError, match="cannot be memory-mapped"):
        read("a")
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        header.read_tensor("a")


def test_one_file_of_a_set_is_mapped_at_a_time(tmp_path: Path) -> None:
    """A set of 14B is 28 GB: its mappings are let go as the reader goes on."""
    for number in (1, 2, 3):
        save_file({f"t{number}": torch.full((3,), number)}, tmp_path / f"m-{number:05}-of-00003.safetensors")
    header = read_header(tmp_path)
    with header.opened() as read:
        for key in header.entries:
            read(key)
            mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
            assert {str(file) for file in header.files} & mapped == {str(header.entries[key].file)}
