"""Coverage-guided fuzzing of the parser, by `make fuzz`: `python -m tests.fuzz.parser FOLDER [libFuzzer options]`.

Starts from the headers of small valid files, without their data, and mutates the bytes; atheris (libFuzzer) keeps what
reaches new code. Any exception but ours, and any file that makes the reader spend more memory than allowed, stops it.
FOLDER keeps the corpus between runs.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["wan_runtime"]):
    from tests.fuzz.files import CASES, answered, parts
    from wan_runtime.dialects import DIALECTS

SCRATCH = Path(tempfile.mkdtemp()) / "model.safetensors"


def one(data: bytes) -> None:
    """The header's bytes as given, and as many zeros after it as its last tensor asks for, within a megabyte."""
    split = data.find(b"\x00\x00\x00\x00")
    text = data if split < 0 else data[:split]
    SCRATCH.write_bytes(struct.pack("<Q", len(text)) + text + bytes(min(_claimed(text), 2**20)))
    answered(SCRATCH, weights=False)


def _claimed(text: bytes) -> int:
    ends = [piece.split(b"]")[0].split(b",")[-1].strip() for piece in text.split(b'"data_offsets":')[1:]]
    return max((int(end) for end in ends if end.isdigit() and len(end) < 9), default=0)


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            parts(*case, Path(folder))
            data = (Path(folder) / "-".join(case) / "model.safetensors").read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            (corpus / f"seed-{number}").write_bytes(data[8 : 8 + length])
    for name in DIALECTS:
        DIALECTS[name]  # imported now, so that a timed run has them instrumented and not loading
    atheris.Setup([sys.argv[0], str(corpus), "-max_len=65536", *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
