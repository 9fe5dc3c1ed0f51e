"""A scaled FP8 checkpoint of random codes in 14B's shapes, written fast, and taken out of the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from opening import Tensors, plain, write  # beside this file

from wan_runtime.containers import read_header

SCALE = 2e-4  # with which random e4m3 codes are about as large as trained weights
PIECE = 8 * 2**20
THREADS = 16


def sizes_for(gib: float) -> dict[str, int]:
    """14B's widths, or a tenth of them where the file is to be small; and as many blocks as it then has."""
    heads = 40 if gib >= 2 else 4
    dim, ffn = 128 * heads, 13824 * heads // 40
    block, rest = 8 * dim**2 + 2 * dim * ffn, 2 * (9 * dim**2 + 4352 * dim)
    layers = max(1, round((gib * 2**30 - rest) / block))
    return {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}


def scaled_fp8(tensors: Tensors) -> Tensors:
    """bf16 tensors as ComfyUI stores scaled FP8: the blocks' Linears as codes with a scale each, and the marker."""
    made: Tensors = {"scaled_fp8": ("F8_E4M3", [2], b"")}
    for key, (dtype, shape, content) in tensors.items():
        quantised = key.startswith("blocks.") and key.endswith(".weight") and len(shape) == 2
        made[key] = ("F8_E4M3" if quantised else dtype, shape, content)
        if quantised:
            made[f"{key.removesuffix('.weight')}.scale_weight"] = ("F32", [], struct.pack("<f", SCALE))
    return made


def fill(path: Path) -> None:
    """Random codes and random bf16 into a file's tensors, so that nothing on the way can compress or skip them."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, PIECE, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] ^= 1  # NaN
    floats = torch.from_numpy(generator.normal(0, 0.02, PIECE // 2).astype(np.float32)).bfloat16()
    contents = {"F8_E4M3": codes.tobytes(), "BF16": floats.view(torch.uint8).numpy().tobytes()}
    with open(path, "r+b") as file, ThreadPoolExecutor(THREADS) as pool:
        jobs = [
            (contents[entry.dtype][: min(PIECE, entry.stop - at)], at)
            for entry in read_header(path).entries.values()
            if entry.dtype in contents
            for at in range(entry.start, entry.stop, PIECE)
        ]
        list(pool.map(lambda job: os.pwrite(file.fileno(), *job), jobs))
        os.fsync(file.fileno())


def drop(path: Path) -> float:
    """Take a file out of the page cache; returns the share of it that stayed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            view = ctypes.c_char.from_buffer(mapped)
            ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), pages)
            del view
    finally:
        os.close(descriptor)
    return float(np.mean(np.frombuffer(memoryview(pages), dtype=np.uint8) & 1))


def make(path: Path, sizes: dict[str, int]) -> None:
    """Write the file for a model of these sizes."""
    others = {name: size for name, size in sizes.items() if name != "num_layers"}
    fill(write(path, scaled_fp8(plain(sizes["num_layers"], **others))))
