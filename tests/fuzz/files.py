"""Damaged files for both fuzzers: a valid tiny file whose header, markers or shapes are changed as some bytes say."""

from __future__ import annotations

import functools
import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.builders.files import Content
from tests.builders.wan import Sizes, block_linears, state
from tests.builders.writers import WRITERS
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.errors import WanRuntimeError

SMALL = Sizes(dim=128, ffn=256, layers=1, text=32, freq=32)
CASES = sorted(
    {(d, f) for d, (_, formats) in WRITERS.items() for f in (formats[0], formats[-1])}
)  # one of each kind
# What a reader may hold beside the file: the header as Python objects, a layer in fp32, and interpreter noise.
ALLOWANCE = 64 * 2**20


@functools.cache
def content(dialect: str, weight_format: str) -> Content:
    """A tiny file; not to be changed."""
    return WRITERS[dialect][0](state(SMALL), block_linears(SMALL), weight_format)


@functools.cache
def parts(dialect: str, weight_format: str, folder: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header of that file, and its data."""
    data = content(dialect, weight_format).write(folder / f"{dialect}-{weight_format}").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def written(folder: Path, header: object, data: bytes, config: object = None) -> Path:
    """A file with this header, whatever it says."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    beside = folder / "config.json"
    beside.unlink(missing_ok=True)
    if config is not None:
        beside.write_text(json.dumps(config))
    return path


def answered(path: Path, *, weights: bool = True) -> bool:
    """Whether a file is read; False for one of our errors. Anything else that is raised goes through.

    Python's own allocations are held to the file's size, so that no length in a header is believed.
    """
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
        if weights:
            for _ in stream(checkpoint, torch.device("cpu")):
                pass
        return True
    except WanRuntimeError as error:
        assert str(error)
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
        assert peak <= size + ALLOWANCE, f"{peak} bytes for files of {size}"


def quantised(header: Mapping[str, Any]) -> list[str]:
    """The keys of one layer and a few others, which matter most."""
    return [key for key in header if ".ffn.0" in key or key in ("head.modulation", "scaled_fp8")]
