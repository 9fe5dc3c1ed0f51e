"""Every dialect's writer: files.py has the file formats of hosts, libraries.py those of libraries, ggml.py GGUF."""

from __future__ import annotations

from tests.builders import files, ggml, libraries

# Those that write safetensors.
WRITERS: dict[str, tuple[files.Writer, tuple[str, ...]]] = {**files.WRITERS, **libraries.WRITERS}
# Every dialect, each in the formats that are damaged.
EVERY: dict[str, tuple[files.Writer, tuple[str, ...]]] = {
    **WRITERS,
    **ggml.WRITERS,
    "plain": (files.plain, ("bf16",)),
}
