"""How fast an FP8 checkpoint of 14B's shapes loads, and what memory that takes, beside what disk and bus allow.

    python benchmarks/loading.py FOLDER [--gib 13.6] [--device cuda] [--sweep] [--json FILE]

It writes a file of random codes into FOLDER, which should be on the disk to be measured, and removes it at the end.
Ceilings: the file read by threads with nothing done to it, out of the page cache (warm) and not (cold, after
POSIX_FADV_DONTNEED; also with O_DIRECT where the file system has it), and copies from pinned memory to the GPU. A
loader's ceiling is the lower of the two. Of ours there are the reading alone, the stream of decoded and checked layers,
and a whole `wan_runtime.load` or `patch`, into a model; the peers give tensors and check nothing. --sweep reads with
other numbers of threads and sizes of buffers. GB are 10^9 bytes. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from opening import peak_memory  # beside this file, as the next
from random_file import PIECE, THREADS, drop, make, sizes_for
from safetensors.torch import load_file

import wan_runtime
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.containers import read_header
from wan_runtime.ring import GpuLane
from wan_runtime.uploading import SENT, SPAN, tensors_on, uploaded
from wan_runtime.uploading import THREADS as READERS

PATIENCE = 10.0  # seconds of a cold read above which the peers are measured warm only


def read_all(path: Path, flags: int = 0) -> None:
    """Every byte of the file into buffers that are used again and again."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    size = os.fstat(descriptor).st_size

    def read(first: int) -> None:
        with mmap.mmap(-1, PIECE) as buffer:  # aligned, as O_DIRECT wants it
            for at in range(first * PIECE, size, THREADS * PIECE):
                os.preadv(descriptor, [buffer], at)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, range(THREADS)))
    finally:
        os.close(descriptor)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One run, from memory that was given back to the end of its copies."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    start = time.perf_counter()
    kept = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del kept
    return taken


def bus(device: torch.device) -> float | None:
    """Bytes a second from pinned memory to the GPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(256 * 2**20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    taken = seconds(lambda: [target.copy_(source, non_blocking=True) for _ in range(20)], device)
    return 20 * source.nbytes / taken


def read(path: Path, device: torch.device) -> Any:
    """The file's tensors, as they are in it."""
    header = read_header(path)
    return list(tensors_on(header, header.entries, device))


def streamed(path: Path, device: torch.device) -> Any:
    """The file's layers, checked, in no model."""
    return list(stream(open_checkpoint(path), device))


def swept(path: Path, device: torch.device, threads: int, span: int) -> Any:
    header = read_header(path)
    return list(uploaded(header, header.entries, GpuLane(device), threads=threads, span=span))


def ours(path: Path, device: torch.device) -> Any:
    """As a user loads it, less what is no loading: fused kernels are compiled and attentions tried at a patch."""
    return wan_runtime.load(path, device=device, fuse=False, attention="sdpa")


def patched(path: Path, device: torch.device, sizes: dict[str, int]) -> Any:
    """A model that its owner made on meta."""
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel(**sizes)
    with torch.device(device):
        wan_runtime.patch(model, path, fuse=False, attention="sdpa")
    return model


def fastsafetensors(path: Path, device: torch.device) -> Any:
    module = importlib.import_module("fastsafetensors")
    with module.fastsafe_open([str(path)], device=str(device), nogds=True) as file:
        keys = file.keys()
        return [file.get_tensor(key) for key in keys]


def runai(path: Path, device: torch.device) -> Any:
    module = importlib.import_module("runai_model_streamer")
    with module.SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return [tensor.to(device) for _, tensor in streamer.get_tensors()]


PEERS: dict[str, tuple[str, Callable[[Path, torch.device], Any]]] = {
    "safetensors load_file": ("safetensors", lambda path, device: load_file(path, device=str(device))),
    "fastsafetensors": ("fastsafetensors", fastsafetensors),
    "runai-model-streamer": ("runai_model_streamer", runai),
}


class Bench:
    """The file, and a row for each thing that was timed on it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.size = path.stat().st_size
        self.rows: list[dict[str, Any]] = []

    def time(self, name: str, run: Callable[[], object], *, cold: bool = False, runs: int = 1) -> float:
        """Median seconds; its row is printed once its ceiling is known."""
        taken, stayed = [], 0.0
        for _ in range(runs):
            stayed = drop(self.path) if cold else 0.0
            taken.append(seconds(run, self.device))
        median = statistics.median(taken)
        row = {
            "what": name,
            "cache": "cold" if cold else "warm",
            "s": median,
            "gb_s": self.size / median / 1e9,
        }
        self.rows.append(row | ({"stayed_cached": stayed} if cold else {}))
        print(f"{name}, {row['cache']}: {median:.2f} s", flush=True)
        return median

    def peers(self, cold: bool) -> None:
        for name, (module, run) in PEERS.items():
            if importlib.util.find_spec(module) is None:
                if not cold:
                    print(f"{name}: not installed")
                continue
            try:
                self.time(name, partial(run, self.path, self.device), cold=cold)
            except Exception as error:  # a peer that does not run here is no reason to lose our own figures
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def measured(bench: Bench, sizes: dict[str, int], sweep: bool) -> dict[str, Any]:
    """All of it, in the order that spares the disk: cold ones first, and warm ones after a read."""
    path, device = bench.path, bench.device
    reads = {"cold": bench.time("read by threads", lambda: read_all(path), cold=True)}
    try:
        direct = bench.time("read by threads, O_DIRECT", lambda: read_all(path, os.O_DIRECT), cold=True)
        reads["cold"] = min(reads["cold"], direct)
    except OSError as error:
        print(f"O_DIRECT: {error}")
    bench.time("ours, load", lambda: ours(path, device), cold=True)
    if reads["cold"] <= PATIENCE:
        bench.peers(cold=True)
    read_all(path)
    reads["warm"] = bench.time("read by threads", lambda: read_all(path), runs=3)
    bench.time("ours, reading alone", lambda: read(path, device), runs=3)
    bench.time("ours, stream", lambda: streamed(path, device), runs=3)
    bench.time("ours, load", lambda: ours(path, device), runs=3)
    bench.time("ours, patch on meta", lambda: patched(path, device, sizes), runs=3)
    bench.peers(cold=False)
    for threads in (4, 8, 16) if sweep and device.type == "cuda" else ():
        for mib in (8, 16, 32):
            run = partial(swept, path, device, threads, mib * 2**20)
            bench.time(f"ours, reading alone, {threads} threads, {mib} MiB", run, runs=2)
    copies = bus(device)
    ceilings = {
        cache: min(bench.size / taken, copies or float("inf")) / 1e9 for cache, taken in reads.items()
    }
    for row in bench.rows:
        row["of_ceiling"] = row["gb_s"] / ceilings[row["cache"]]
    return {"bus_gb_s": copies and copies / 1e9, "ceiling_gb_s": ceilings}


def memory(path: Path, device: torch.device, sizes: dict[str, int]) -> dict[str, float | None]:
    """GiB that a patch of a model on meta takes at its peak: on the GPU, and of the host's own memory (RssAnon), which
    pinned buffers are not part of."""
    gc.collect()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    kept: list[Any] = []
    anonymous = peak_memory(lambda: kept.append(patched(path, device, sizes)))
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return {
        "gpu_peak_gib": peak,
        "gpu_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
        "gpu_over_file_gib": None if peak is None else peak - path.stat().st_size / 2**30,
        "host_anonymous_gib": anonymous / 2**30,
        "host_pinned_gib": (READERS + SENT) * SPAN / 2**30 if gpu else 0.0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | page cache | s | GB/s | of the ceiling |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['cache']} | {row['s']:.2f} | {row['gb_s']:.2f} | {row['of_ceiling']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=13.6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    device = torch.device(given.device)
    given.folder.mkdir(parents=True, exist_ok=True)
    path, small = given.folder / "loading-fp8.safetensors", given.folder / "loading-warm-up.safetensors"
    sizes = sizes_for(given.gib)
    try:
        start = time.perf_counter()
        for file, made in ((small, sizes_for(0.01)), (path, sizes)):
            make(file, made)
        print(f"wrote {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)
        ours(small, device)  # CUDA's context and torch's kernels are loaded once a process
        bench = Bench(path, device)
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "file_gb": bench.size / 1e9,
            **measured(bench, sizes, given.sweep),
            "rows": bench.rows,
            "memory": memory(path, device, sizes),
        }
    finally:
        for file in (path, small):
            file.unlink(missing_ok=True)
    print(table(figures["rows"]))
    print(json.dumps(figures))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
