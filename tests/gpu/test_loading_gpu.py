"""Loading onto a GPU: every tensor bit for bit as on the CPU, every refusal in the same words, memory in bounds."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import wan_runtime
from tests.builders import files
from tests.builders.wan import Sizes, block_linears, rows, state
from tests.reading import CASES, FIRST, content
from tests.test_api import transformer_on_meta
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.linear import quantised_layers
from wan_runtime.ring import GpuLane
from wan_runtime.swap import patched_state
from wan_runtime.uploading import tensors_on, uploaded

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


def same(on_gpu: torch.Tensor, on_cpu: torch.Tensor) -> bool:
    assert on_gpu.is_cuda and (on_gpu.dtype, on_gpu.shape) == (on_cpu.dtype, on_cpu.shape)
    bits = [tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (on_gpu, on_cpu)]
    return bits[0].equal(bits[1])


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_every_slot_is_what_the_cpu_reads(
    tmp_path: Path, dialect: str, weight_format: str, spelling: str
) -> None:
    checkpoint = open_checkpoint(
        content(dialect, weight_format, spelling).write(tmp_path),
        dialect=dialect if spelling == "diffusers" else None,
    )
    wanted = {item.path: item for item in stream(checkpoint, CPU)}
    found = {item.path: item for item in stream(checkpoint, GPU)}
    assert found.keys() == wanted.keys()
    for path, item in found.items():
        assert item.format == wanted[path].format and item.slots.keys() == wanted[path].slots.keys()
        assert all(same(slot, wanted[path].slots[name]) for name, slot in item.slots.items()), path


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("span", [4096, 100_000, 8 * MIB])
def test_large_tensors_come_whole_however_they_are_cut(tmp_path: Path, threads: int, span: int) -> None:
    """While the device computes on what came before, and memory that was let go is given out again."""
    if span == 4096:
        size, count = 300_001, 6
    else:
        size, count = 30_000_001, 12
    generator = torch.Generator().manual_seed(0)
    tensors = {"empty": torch.empty(0, 3)}
    for number in range(count):
        tensors[f"w{number}"] = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        tensors[f"b{number}"] = torch.randn(7, generator=generator)
    save_file(tensors, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    sums: dict[str, torch.Tensor] = {}
    arrived: dict[str, torch.Tensor] = {}
    for key, tensor in uploaded(header, header.entries, GpuLane(GPU), threads=threads, span=span):
        sums[key] = tensor.double().square().sum()  # large temporary memory, let go of at once
        if len(arrived) % 2 == 0:
            arrived[key] = tensor.clone()
        else:
            arrived[key] = tensor
    for key, wanted in tensors.items():
        assert same(arrived[key], wanted)
        assert sums[key].item() == pytest.approx(wanted.double().square().sum().item(), rel=1e-12)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    wanted: dict[str, torch.Tensor] = {}
    for number in range(1, 5):
        part = {
            f"t{number}": torch.randint(0, 256, (3 * MIB,), dtype=torch.uint8),
            f"u{number}": torch.ones(3),
        }
        save_file(part, tmp_path / f"m-{number:05}-of-00004.safetensors")
        wanted |= part
    header = read_header(tmp_path)
    found = dict(tensors_on(header, header.entries, GPU))
    assert found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)


def test_another_stream_and_inference_mode_get_whole_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(content("comfy", "nvfp4").write(tmp_path))
    wanted = {item.path: item.slots for item in stream(checkpoint, CPU)}
    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
        found = {item.path: item.slots for item in stream(checkpoint, GPU)}
        torch.cuda.current_stream().synchronize()
    for path, slots in found.items():
        assert all(same(slot, wanted[path][name]) for name, slot in slots.items())


DAMAGE = {"negative": -1.0, "infinite": float("inf"), "NaN": float("nan"), "large": 1e6, "zero": 0.0}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("dialect", "weight_format"),
    [
        case
        for case in CASES
        if case[0] != "plain_fp8" and case[1] != "none" and files.float_scale_leaf(*case)
    ],
)
def test_damage_is_refused_in_the_same_words(
    tmp_path: Path, dialect: str, weight_format: str, damage: str
) -> None:
    wanted = content(dialect, weight_format)
    key = f"{FIRST}.{files.float_scale_leaf(dialect, weight_format)}"
    wanted.tensors[key] = wanted.tensors[key] * DAMAGE[damage]
    path = wanted.write(tmp_path)
    words = []
    for device in (CPU, GPU):
        with pytest.raises(CheckpointError) as caught:
            list(stream(open_checkpoint(path), device))
        words.append(str(caught.value))
    assert words[0] == words[1]
    model = transformer_on_meta()
    with torch.device("cuda"), pytest.raises(CheckpointError):
        wan_runtime.patch(model, path)
    assert all(p.is_meta for p in model.parameters()) and patched_state(model) is None


def test_damaged_codes_and_plain_tensors_are_refused_in_the_same_words(tmp_path: Path) -> None:
    for number, key in enumerate((f"{FIRST}.weight", "blocks.1.norm3.weight", "head.head.bias")):
        wanted = content("comfy_scaled_fp8", "fp8")
        tensor = wanted.tensors[key].clone()
        if tensor.dtype.itemsize == 1:
            tensor.view(torch.uint8).view(-1)[5] = 0x7F
        else:
            tensor.view(-1)[5] = float("nan")
        wanted.tensors[key] = tensor
        path = wanted.write(tmp_path / str(number))
        words = []
        for device in (CPU, GPU):
            with pytest.raises(BadTensor) as caught:
                list(stream(open_checkpoint(path), device))
            assert caught.value.key == key
            words.append(str(caught.value))
        assert words[0] == words[1]


def test_a_model_on_meta_goes_straight_to_the_default_device_and_runs(tmp_path: Path) -> None:
    path = files.comfy_scaled_fp8(state(), block_linears(), "fp8").write(tmp_path)
    model = transformer_on_meta()
    with torch.device("cuda"):
        wan_runtime.patch(model, path)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    loaded = wan_runtime.load(path, device="cuda")
    for (name, one), two in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file of 0.7 GB in 14B's widths: one block, and the layers around it in bf16."""
    sizes = Sizes(dim=5120, ffn=13824, layers=1, text=4096, freq=256)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    linears = set(block_linears(sizes, "diffusers"))
    for _, key, shape in rows(sizes):
        module = key.removesuffix(".weight")
        if module in linears and key != module:
            codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            codes = torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)
            tensors[key] = codes.view(torch.float8_e4m3fn)
            tensors[f"{module}.scale_weight"] = torch.tensor(2e-4)
        else:
            tensors[key] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_file(tensors, path)
    return path, sizes


def test_a_patch_takes_the_file_and_little_more(large: tuple[Path, Any]) -> None:
    """On the GPU at most the file and 1 GiB, of which the fp32 residents of a bf16 file are most; on the host, none of
    it but the pinned buffers."""
    path, _ = large
    wan_runtime.load(
        path, device="cuda", fuse=False, attention="sdpa"
    )  # kernels and buffers are made once a process
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    anonymous = _anonymous()
    model = wan_runtime.load(path, device="cuda", fuse=False, attention="sdpa")
    peak = torch.cuda.max_memory_allocated() - before
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert peak <= path.stat().st_size + 1024 * MIB
    assert torch.cuda.memory_allocated() - before <= held + 16 * MIB, "something is kept twice"
    assert _anonymous() - anonymous < 300 * MIB
    assert len(list(quantised_layers(model))) == 10


@pytest.mark.parametrize("weights", ["nvfp4", "fp8"])
def test_requantising_a_file_keeps_only_what_it_makes(large: tuple[Path, Any], weights: str) -> None:
    path, _ = large
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = wan_runtime.load(path, device="cuda", fuse=False, attention="sdpa", weights=weights)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= held + 16 * MIB


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_gpu_is_not_waited_for_at_each_tensor(
    large: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of a scaled FP8 file reads values back a few times a file, not a few times a tensor."""
    path, _ = large
    checkpoint = open_checkpoint(path)
    list(stream(checkpoint, GPU))
    with pytest.warns(UserWarning, match="synchroniz") as waits:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in stream(checkpoint, GPU):
                pass
            torch.zeros((), device="cuda").item()  # one at least, so that silence is not taken for few
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 4, {f"{w.filename}:{w.lineno}" for w in waits}


def test_an_abandoned_load_leaves_no_thread_and_frees_its_memory(large: tuple[Path, Any]) -> None:
    path, _ = large
    checkpoint = open_checkpoint(path)
    gc.collect()
    threads, before = threading.active_count(), torch.cuda.memory_allocated()
    items = stream(checkpoint, GPU)
    next(items)
    items.close()  # type: ignore[attr-defined]
    gc.collect()
    assert threading.active_count() == threads and torch.cuda.memory_allocated() == before
