"""Times `inspect` on 14B checkpoints, and takes the memory of streaming one: `python benchmarks/opening.py FOLDER`.

The files have the shapes of Wan2.1 T2V-14B and no contents: they are sparse, 28 GB to `ls` and 2 MB on the disk. What
is read of them is what is read of real ones: headers, and the small records that say how each layer is quantised.
Streaming reads everything, so it is done on a model of the same widths with 4 layers instead of 40.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

import wan_runtime
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.header import DTYPES

RUNS = 7
MIB = 2**20
RECORD = json.dumps({"format": "nvfp4"}).encode()
Tensors = dict[str, tuple[str, list[int], bytes]]  # key -> dtype, shape, contents; none are zeros


def plain(layers: int, **sizes: int) -> Tensors:
    """All tensors in bf16; 14B's sizes where none are given."""
    with init_empty_weights():
        model = WanTransformer3DModel(num_layers=layers, **sizes)
    return {key: ("BF16", list(tensor.shape), b"") for key, tensor in model.state_dict().items()}


def comfy_nvfp4(tensors: Tensors) -> Tensors:
    """The same with the blocks' Linears as ComfyUI stores NVFP4: four tensors each, one of which must be read."""
    made: Tensors = {}
    for key, (dtype, shape, _) in tensors.items():
        path = key.removesuffix(".weight")
        if not key.startswith("blocks.") or key == path or len(shape) != 2:
            made[key] = (dtype, shape, b"")
            continue
        made[key] = ("U8", [shape[0], shape[1] // 2], b"")
        made[f"{path}.weight_scale"] = ("F8_E4M3", [shape[0], shape[1] // 16], b"")
        made[f"{path}.weight_scale_2"] = ("F32", [], b"")
        made[f"{path}.comfy_quant"] = ("U8", [len(RECORD)], RECORD)
    return made


def write(path: Path, tensors: Tensors) -> Path:
    """A safetensors file, sparse where nothing is written."""
    fields: dict[str, object] = {}
    contents: dict[int, bytes] = {}
    at = 0
    for key, (dtype, shape, content) in tensors.items():
        stop = at + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        fields[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        contents[at] = content
        at = stop
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for place, content in contents.items():
            file.seek(8 + len(text) + place)
            file.write(content)
    return path


def shards(folder: Path, tensors: Tensors, count: int) -> Path:
    """The tensors in `count` files and an index."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, str] = {}
    keys = list(tensors)
    for number in range(count):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        part = keys[number * len(keys) // count : (number + 1) * len(keys) // count]
        write(folder / name, {key: tensors[key] for key in part})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def timed(path: Path) -> str:
    """The first call and the median of the next ones, wall clock, and the median of the processor's time."""
    walls, cpus = [], []
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        found = wan_runtime.inspect(path)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    size = f"{found.bytes / 1e9:.1f} GB, {found.tensors} tensors"
    rest = (
        f"then {statistics.median(walls[1:]):.2f} s ({statistics.median(cpus[1:]):.2f} s of processor time)"
    )
    return f"{path.name}: {size}: first {walls[0]:.2f} s, {rest}"


def peak_memory(run: Callable[[], None]) -> int:
    """The most memory of its own (not of mapped files) that `run` took, in bytes; sampled every millisecond."""
    done, samples = threading.Event(), [_anonymous()]

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(_anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(samples) - samples[0]


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = plain(40)
    for path in (
        write(folder / "bf16.safetensors", tensors),
        shards(folder / "shards", tensors, 6),
        write(folder / "comfy-nvfp4.safetensors", comfy_nvfp4(tensors)),
    ):
        print(timed(path), flush=True)

    checkpoint = open_checkpoint(shards(folder / "short", plain(4), 3))

    def run() -> None:
        for _ in stream(checkpoint, torch.device("cpu")):
            pass

    largest = max(entry.nbytes for entry in checkpoint.header.entries.values())
    print(
        f"streaming {checkpoint.header.nbytes / MIB:.0f} MiB in 3 shards took {peak_memory(run) / MIB:.0f} MiB"
    )
    print(f"the largest tensor has {largest / MIB:.0f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
