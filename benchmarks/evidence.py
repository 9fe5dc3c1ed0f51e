"""Counts right and false answers of the layout and nibble tests: `python benchmarks/evidence.py`, half a minute.

On the tiny trained model, whole and one block at a time, and on random weights of its shapes: independent values, rows
of different size, columns of different size, and both. Each set is quantised to NVFP4 and read as it is and as a wrong
reader would: block scales in the other order, nibbles swapped.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from wan_runtime.containers import read_header
from wan_runtime.dialects import DIALECTS, _swizzle
from wan_runtime.evidence import layout_test, nibble_test
from wan_runtime.formats import FORMATS
from wan_runtime.header import Header
from wan_runtime.tiny.variants import SOURCE

SEEDS = 20
Tensors = dict[str, torch.Tensor]


def spread(kind: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    rows, columns = (0.3 * torch.randn(n, generator=generator) for n in shape)
    sizes = torch.zeros(shape)
    if kind in ("rows differ", "both differ"):
        sizes = sizes + rows[:, None]
    if kind in ("columns differ", "both differ"):
        sizes = sizes + columns[None]
    return 0.03 * torch.randn(shape, generator=generator) * sizes.exp()


def random_weights(like: Tensors, kind: str, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: spread(kind, tensor.shape, generator)
        if tensor.ndim == 2
        else 1 + 0.1 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in like.items()
    }


def blocks_of(tensors: Tensors, number: int | None) -> Tensors:
    prefix = "blocks." if number is None else f"blocks.{number}."
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def cases(trained: Tensors) -> Iterator[tuple[str, Tensors]]:
    numbers = sorted({int(key.split(".")[1]) for key in blocks_of(trained, None)})
    yield "trained", blocks_of(trained, None)
    for number in numbers:
        yield "trained, one block", blocks_of(trained, number)
    one = blocks_of(trained, 0) | blocks_of(trained, 1)
    for kind in ("independent", "rows differ", "columns differ", "both differ"):
        for seed in range(SEEDS):
            yield kind, random_weights(one, kind, seed)


def quantised(tensors: Tensors, *, swapped: bool) -> Tensors:
    written: Tensors = {}
    for key, tensor in tensors.items():
        if tensor.ndim != 2:
            written[key] = tensor.clone()
            continue
        slots = FORMATS["nvfp4"].quantize(tensor.float(), False)
        payload = slots["payload"]
        written[key] = (payload >> 4) | (payload << 4) if swapped else payload
        written[f"{key}_scale"] = slots["block_scale"].view(torch.float8_e4m3fn)
        written[f"{key}_scale_2"] = slots["scale"].reshape(())
    return written


def opened(tensors: Tensors, folder: Path) -> Header:
    path = folder / "case.safetensors"
    save_file(tensors, path)
    return read_header(path)


def judged(answer: str | None, truth: str) -> str:
    return "none" if answer is None else "right" if answer == truth else "false"


def count(name: str, tensors: Tensors, folder: Path, counts: Counter[tuple[str, str, str]]) -> None:
    right = quantised(tensors, swapped=False)
    scales = [tensor for key, tensor in right.items() if key.endswith("weight_scale")]
    counts[name, "layout, plain", judged(layout_test(scales).answer, "plain")] += 1
    tiled = [_swizzle.swizzle(s.view(torch.uint8)).view(s.dtype) for s in scales]
    counts[name, "layout, swizzled", judged(layout_test(tiled).answer, "swizzled")] += 1
    for reading, swapped in (("right", False), ("swapped", True)):
        header = opened(quantised(tensors, swapped=True) if swapped else right, folder)
        finding = nibble_test(header, DIALECTS["modelopt"].read(header).layers)
        counts[name, f"nibbles, {reading}", judged(finding.answer, reading)] += 1


def main() -> None:
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors in cases(load_file(SOURCE)):
            count(name, tensors, Path(folder), counts)
    print("| weights | file | right | no answer | false |\n|---|---|---|---|---|")
    for name, case in dict.fromkeys((name, case) for name, case, _ in counts):
        cells = " | ".join(str(counts[name, case, outcome]) for outcome in ("right", "none", "false"))
        print(f"| {name} | {case} | {cells} |")


if __name__ == "__main__":
    main()
