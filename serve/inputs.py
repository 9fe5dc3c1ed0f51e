"""Start images in the data directory: written by the HTTP process before a job is added, read by the worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from wan_runtime import InvalidRequest, StartImage, open_image, written_aside

from .storage import Storage

UNKNOWN = "0" * 64  # stands for an image's digest until it is there


@contextlib.contextmanager
def kept(storage: Storage, job_id: str, picture: bytes | None) -> Iterator[None]:
    """The picture in the data directory while the job is added, and after that only if it was."""
    if picture is None:
        yield
        return
    path = storage.start_image(job_id)
    with written_aside(path, mode=0o600) as aside:
        aside.write_bytes(picture)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_kept(path: Path, sha256: str) -> StartImage:
    """The picture of a job, in the worker. Raises InvalidRequest where it is gone or was damaged."""
    try:
        return StartImage(open_image(path).picture, sha256)
    except (OSError, InvalidRequest):
        message = "The start image of this job is not in the data directory any more, or was damaged there."
        raise InvalidRequest("image", "start_image_lost", message) from None
