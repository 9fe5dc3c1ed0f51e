"""Writing a file aside and renaming it: a reader sees the old file or the whole new one, also after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` when the block ends, and is removed when it fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _flush(path.parent)  # the rename itself must survive a power cut


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
