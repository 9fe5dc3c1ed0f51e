"""The fault matrix: `python -m tests.faults.matrix` prints it, with `--write` into docs/formats.md as well.

For every dialect and format, each fault in turn is made, and the file is loaded: read (every weight is right), refused
(by one of our errors), or wrong (accepted with other weights, or refused although nothing was damaged).
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch

import wan_runtime
from tests.builders.files import Content
from tests.builders.writers import EVERY
from tests.faults import ggml, kinds
from tests.faults.kinds import Fault, File
from tests.faults.trained import originals, trained
from wan_runtime.checkpoint import Checkpoint, open_checkpoint, stream
from wan_runtime.corrections import effective_weight
from wan_runtime.errors import CheckpointError, WanRuntimeError

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- fault matrix -->", "<!-- end of the fault matrix -->"
HEADER_FLIPS = 24
CASES = [(dialect, held) for dialect, (_, formats) in EVERY.items() for held in formats]
UNTELLABLE = {*kinds.UNTELLABLE, *ggml.UNTELLABLE}


def outcome(path: Path, truth: Content) -> str:
    """Either "read", "refused" or "wrong". Anything raised that is no WanRuntimeError goes through: it is a bug."""
    try:
        checkpoint = open_checkpoint(path)
        right = _holds(checkpoint, truth)
        if not right:  # tensors that are missing or of another shape: it is the model that says so
            wan_runtime.load(path, device="cpu")
    except WanRuntimeError as error:
        assert isinstance(error, CheckpointError), error
        return "refused"
    return "read" if right else "wrong"


def _holds(checkpoint: Checkpoint, truth: Content) -> bool:
    """Whether every weight and every other tensor is there, and is what was written."""
    plain = {
        key: tensor for key, tensor in originals().items() if key.removesuffix(".weight") not in truth.weights
    }
    found, right = set(), True
    for item in stream(checkpoint, torch.device("cpu")):
        found.add(item.path)
        if item.format is None:
            want = plain.get(item.path)
            if want is None:
                meant = truth.weights.get(item.path.removesuffix(".weight"))
                want = None if meant is None else torch.from_numpy(meant).float()
            have = item.slots["tensor"].float()
        else:
            meant = truth.weights.get(item.path)
            want = None if meant is None else torch.from_numpy(meant).float()
            have = effective_weight(item.format, item.slots)
        right &= (
            want is not None and have.shape == want.shape and np.allclose(have, want, rtol=1e-5, atol=1e-7)
        )
    wanted = plain.keys() | truth.weights.keys()
    named = {
        name.removesuffix(".weight") if name.removesuffix(".weight") in truth.weights else name
        for name in found
    }
    return right and wanted <= named


def faults(dialect: str) -> dict[str, Fault]:
    """All that a dialect's files are damaged by, beside their bytes."""
    of = ggml if dialect == "gguf" else kinds
    return {**of.TELLABLE, **of.UNTELLABLE}


def header_bytes(path: Path) -> tuple[int, int]:
    """Where a file's header lies: behind safetensors' length, or all of GGUF's up to the first tensor."""
    data = path.read_bytes()
    if data[:4] == b"GGUF":
        return 0, gguf.GGUFReader(path).data_offset
    (length,) = struct.unpack("<Q", data[:8])
    return 8, 8 + length


def damaged_bytes(content: Content, folder: Path, flips: int) -> Iterator[tuple[str, Path]]:
    """A file cut at three places, and with single bits of its header flipped."""
    whole = content.write(folder / "whole")
    data = whole.read_bytes()
    start, stop = header_bytes(whole)
    for size in (4, (start + stop) // 2, (stop + len(data)) // 2, len(data) - 1):
        yield "cut", _beside(folder / "cut", content, data[:size])
    generator = random.Random(0)
    for _ in range(flips):
        changed = bytearray(data)
        changed[generator.randrange(start, stop)] ^= 1 << generator.randrange(7)
        yield "flip a bit of the header", _beside(folder / "flip", content, bytes(changed))


def _beside(folder: Path, content: Content, data: bytes) -> Path:
    path = content.write(folder)
    path.write_bytes(data)
    return path


def run(
    dialect: str, weight_format: str, folder: Path, *, flips: int = HEADER_FLIPS
) -> Counter[tuple[str, str]]:
    """(fault, outcome) -> how often, over one dialect in one format."""
    truth = trained(dialect, weight_format)
    counts: Counter[tuple[str, str]] = Counter()
    file = File(truth, dialect, weight_format)
    counts["intact", outcome(truth.write(folder / "intact"), truth)] += 1
    prefixed = trained(dialect, weight_format, "model.diffusion_model.")
    counts["intact, with a prefix", outcome(prefixed.write(folder / "prefix"), truth)] += 1
    for name, fault in faults(dialect).items():
        for content in fault(file):
            counts[name, outcome(content.write(folder / "damaged"), truth)] += 1
    for name, path in damaged_bytes(truth, folder, flips):
        counts[name, outcome(path, truth)] += 1
    return counts


def wrong(counts: Counter[tuple[str, str]]) -> dict[str, str]:
    """Faults that a reader can tell and that were not answered right -> the answer."""
    found = {}
    for (fault, answer), _ in counts.items():
        refused = fault.startswith("intact") and answer != "read"
        if refused or (fault not in UNTELLABLE and answer == "wrong"):
            found[fault] = answer
    return found


def table(rows: dict[tuple[str, str], Counter[tuple[str, str]]]) -> str:
    lines = [
        "| dialect | format | files | read | refused | wrong | accepted, and no reader can tell |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dialect, weight_format), counts in rows.items():
        cells = dict.fromkeys(("read", "refused", "wrong", "untellable"), 0)
        bad = wrong(counts)
        for (fault, answer), count in counts.items():
            untellable = fault in UNTELLABLE and answer == "wrong"
            cells["untellable" if untellable else "wrong" if bad.get(fault) == answer else answer] += count
        figures = " | ".join(str(count) for count in (sum(counts.values()), *cells.values()))
        lines.append(f"| `{dialect}` | `{weight_format}` | {figures} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows[case] = run(*case, Path(folder))
        if unexpected := wrong(rows[case]):
            print(*case, unexpected, file=sys.stderr)
    text = table(rows)
    print(text)
    if "--write" in sys.argv:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    if any(wrong(counts) for counts in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
