"""Reading by threads through a ring of buffers: every byte, in order, with few buffers, and what is refused."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.lanes import Memory
from tests.reading import QUANTISED, content
from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Entry, Header
from wan_runtime.ring import Ring
from wan_runtime.spans import spans
from wan_runtime.uploading import SENT, tensors_on, uploaded

KIB = 1024


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and bits[0].equal(bits[1])


def big(path: Path, count: int = 9, size: int = 50_001, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of odd sizes, with small ones between and one that is empty."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"none": torch.empty(0, 4)}
    for number in range(count):
        tensors[f"w{number}"] = torch.randint(
            0, 256, (size + number,), dtype=torch.uint8, generator=generator
        )
        tensors[f"b{number}"] = torch.randn(3, generator=generator)
    save_file(tensors, path)
    return tensors


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    gaps=st.sets(st.integers(0, 11)),
    limit=st.integers(1, 50),
)
def test_spans_hold_every_byte_once(sizes: list[int], gaps: set[int], limit: int) -> None:
    entries, at = {}, 100
    for number, size in enumerate(sizes):
        at += 7 * (number in gaps)
        entries[f"t{number}"] = Entry("U8", (size,), at, at + size, Path("ab"[number // 6]))
        at += size
    seen: dict[str, list[tuple[int, int]]] = {}
    order = []
    for span in spans(entries, entries, limit):
        assert 0 <= span.size <= limit and sum(part.size for part in span.parts) == span.size
        for part in span.parts:
            entry = entries[part.key]
            assert span.file == entry.file and span.start + part.at == entry.start + part.offset
            seen.setdefault(part.key, []).append((part.offset, part.offset + part.size))
            if part.offset + part.size == entry.nbytes:
                order.append(part.key)
    assert order == list(entries)
    for key, runs in seen.items():
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert runs[-1][1] == entries[key].nbytes


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("span", [1000, 64 * KIB, 8 * 2**20])
def test_tensors_arrive_in_order_and_whole(tmp_path: Path, threads: int, span: int) -> None:
    tensors = big(tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    lane = Memory()
    arrived = list(uploaded(header, header.entries, lane, threads=threads, span=span))
    assert [key for key, _ in arrived] == list(header.entries)
    assert all(same(tensor, tensors[key]) for key, tensor in arrived)
    assert 1 <= len(lane.buffers) <= threads + SENT and all(b.numel() == span for b in lane.buffers)


@pytest.mark.parametrize(("dialect", "weight_format"), QUANTISED)
def test_every_dialect_s_file_is_read_as_the_mapped_one(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    header = read_header(content(dialect, weight_format).write(tmp_path))
    mapped = dict(tensors_on(header, header.entries, torch.device("cpu")))
    arrived = dict(uploaded(header, header.entries, Memory(), threads=3, span=10_000))
    assert arrived.keys() == mapped.keys()
    assert all(same(arrived[key], mapped[key]) for key in mapped)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_on_the_way_is_bounded(tmp_path: Path, threads: int) -> None:
    """A consumer that keeps nothing never sees more tensors made than a few spans and the tensor they end in."""
    span, size = 10_000, 25_000
    big(tmp_path / "m.safetensors", count=40, size=size)
    header = read_header(tmp_path / "m.safetensors")
    lane = Counting()
    for _, tensor in uploaded(header, header.entries, lane, threads=threads, span=span):
        del tensor
        lane.seen.append(sum(nbytes for ref, nbytes in lane.rooms if ref() is not None))
    assert len(lane.seen) == 81 and 0 < max(lane.seen) <= 2 * threads * span + 2 * (size + 40)
    assert len(lane.buffers) <= threads + SENT


class Counting(Memory):
    """Knows which tensors of those it made are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self.seen: list[int] = []

    def room(self, nbytes: int) -> torch.Tensor:
        room = super().room(nbytes)
        self.rooms.append((weakref.ref(room), nbytes))
        return room


def test_a_set_of_files_is_read_and_each_is_closed_when_it_was(tmp_path: Path) -> None:
    wanted: dict[str, torch.Tensor] = {}
    for number in range(1, 6):
        part = {f"t{number}": torch.full((20_000,), number), f"u{number}": torch.ones(number)}
        save_file(part, tmp_path / f"m-{number:05}-of-00005.safetensors")
        wanted |= part
    header = read_header(tmp_path)
    for key, tensor in uploaded(header, header.entries, Memory(), threads=2, span=30_000):
        assert same(tensor, wanted.pop(key))
        ahead = [file for file in header.files if file.name >= header.entries[key].file.name]
        assert open_here(header) <= {str(file) for file in ahead}
    assert not wanted and not open_here(header)


def open_here(header: Header) -> set[str]:
    names = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names.add(os.readlink(f"/proc/self/fd/{number}"))
    return names & {str(file) for file in header.files}


def test_only_the_keys_asked_for_are_read(tmp_path: Path) -> None:
    tensors = big(tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    keys = [key for key in header.entries if key.startswith("b") or key == "w4"]
    arrived = dict(uploaded(header, keys, Memory(), threads=2, span=64 * KIB))
    assert list(arrived) == keys and all(same(arrived[key], tensors[key]) for key in keys)


def test_a_caller_in_inference_mode_gets_its_tensors(tmp_path: Path) -> None:
    tensors = big(tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    for threads in (1, 3):
        with torch.inference_mode():
            arrived = dict(uploaded(header, header.entries, Memory(), threads=threads, span=8 * KIB))
        assert all(same(arrived[key], tensors[key]) for key in tensors)


def test_a_consumer_that_stops_early_leaves_nothing_behind(tmp_path: Path) -> None:
    big(tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    before = threading.active_count()
    lane = Memory()
    reading = uploaded(header, header.entries, lane, threads=4, span=10_000)
    next(reading)
    assert threading.active_count() > before and open_here(header)
    reading.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and not open_here(header) and lane.drained


def test_a_file_cut_short_since_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    big(path)
    header = read_header(path)
    size = path.stat().st_size
    os.truncate(path, size - 8)
    with pytest.raises(CheckpointError, match=f"had {size} bytes .* has {size - 8} now"):
        list(uploaded(header, header.entries, Memory()))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        list(uploaded(header, header.entries, Memory()))


def test_a_file_cut_short_while_it_is_read_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    big(path, count=60)
    header = read_header(path)
    last = list(header.entries)[-1]
    threads = threading.active_count()
    with pytest.raises(BadTensor, match="became shorter while it was read") as caught:
        for number, _ in enumerate(uploaded(header, header.entries, Memory(), threads=2, span=10_000)):
            if number == 0:
                os.truncate(path, header.entries[last].start + 1)
    assert caught.value.key == last and caught.value.path == path
    assert threading.active_count() == threads and not open_here(header)


def test_a_disk_s_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big(tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"cannot be read any more .*Input/output error"):
        list(uploaded(header, header.entries, Memory()))


def test_a_buffer_comes_back_when_what_was_sent_from_it_has_arrived() -> None:
    lane = Memory()
    ring = Ring(lane, 2, 8)
    targets = [torch.zeros(8, dtype=torch.uint8) for _ in range(5)]
    for value, target in enumerate(targets, 1):
        buffer = ring.take().fill_(value)
        ring.give(buffer, lane.send([(target, buffer)]))
    ring.take()
    ring.take()
    assert len(lane.buffers) == 2
    assert [target.tolist() for target in targets] == [[value] * 8 for value in range(1, 6)]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(span=st.integers(1, 5000), threads=st.integers(1, 4), data=st.data())
def test_any_cut_of_any_file_gives_the_mapped_tensors(
    tmp_path: Path, span: int, threads: int, data: st.DataObject
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8))
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.bool]
    tensors = {
        f"t{number}": torch.randint(0, 2, shape).to(dtypes[number % len(dtypes)])
        for number, shape in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    arrived = dict(uploaded(header, header.entries, Memory(), threads=threads, span=span))
    assert arrived.keys() == tensors.keys() and all(same(arrived[key], tensors[key]) for key in tensors)
