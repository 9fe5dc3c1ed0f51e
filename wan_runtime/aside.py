"""Writing a file aside and renaming it: a reader sees the old file or the whole new one, also after a power cut.

A process that is killed leaves its temporary behind. While it lives it holds a lock on it, so the next writer of the
same file knows what nobody writes any more, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` when the block ends, and is removed when it fails.

    mode: the file's permissions from its first byte on, less the process's umask.
    Temporaries of `path` whose writers were killed are removed first.
    """
    _remove_abandoned(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _locked(aside, mode):
        try:
            yield aside
            _flush(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    _flush(path.parent)  # the rename itself must survive a power cut


@contextlib.contextmanager
def _locked(aside: Path, mode: int) -> Iterator[None]:
    """The file made, and locked until the block ends or the process does."""
    handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        with contextlib.suppress(
            OSError
        ):  # a file system without locks: the temporary then looks abandoned to others
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporaries of `path` that no process holds a lock on."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.part", root_dir=path.parent, include_hidden=True):
        left = path.parent / name
        with contextlib.suppress(OSError):  # another writer holds it, or was quicker to remove it
            handle = os.open(left, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
