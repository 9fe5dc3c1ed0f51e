"""Where clips lie. Paths come from job ids alone: nothing that a client sends ever becomes part of a path."""

from __future__ import annotations

import contextlib
import fcntl
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ID = re.compile(r"video_[0-9a-f]{32}")


def new_id() -> str:
    """An id that nobody can guess: 128 random bits."""
    return f"video_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Storage:
    """The data directory: `jobs.sqlite3`; `videos/<id>.mp4`, `.webp` and `.jpg` for each completed job; and
    `inputs/<id>.png` for each job that starts from an image, for as long as there is the job."""

    root: Path

    @property
    def database(self) -> Path:
        """The jobs' database."""
        return self.root / "jobs.sqlite3"

    @property
    def videos(self) -> Path:
        """The folder of finished clips."""
        return self.root / "videos"

    @property
    def inputs(self) -> Path:
        """The folder of start images."""
        return self.root / "inputs"

    def video(self, job_id: str) -> Path:
        """Where the clip of a job lies, once it is complete. Raises ValueError for anything but an id of ours."""
        return self._path(job_id, ".mp4")

    def thumbnail(self, job_id: str) -> Path:
        """Where the clip's thumbnail lies."""
        return self._path(job_id, ".webp")

    def spritesheet(self, job_id: str) -> Path:
        """Where the clip's spritesheet lies."""
        return self._path(job_id, ".jpg")

    def start_image(self, job_id: str) -> Path:
        """Where the image lies that the job's clip starts from."""
        return self._path(job_id, ".png", self.inputs)

    def _path(self, job_id: str, suffix: str, folder: Path | None = None) -> Path:
        if not ID.fullmatch(job_id):
            raise ValueError(f"{job_id!r} is not a job id.")
        return (folder or self.videos) / f"{job_id}{suffix}"

    def size(self, job_id: str) -> int:
        """The bytes of a job's files, or 0 unless its clip, which is written last, is there."""
        if not self.video(job_id).is_file():
            return 0
        return sum(path.stat().st_size for path in self._files(job_id) if path.is_file())

    def _files(self, job_id: str) -> tuple[Path, ...]:
        return self.video(job_id), self.thumbnail(job_id), self.spritesheet(job_id), self.start_image(job_id)

    def delete(self, job_id: str) -> None:
        """Removes a job's files, if there are any."""
        for path in self._files(job_id):
            path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Creates the folders and the database's file, readable by this user alone, also in a folder that is not."""
        for folder in (self.root, self.videos, self.inputs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.database.touch(mode=0o600)
        for private, mode in ((self.videos, 0o700), (self.inputs, 0o700), (self.database, 0o600)):
            if private.stat().st_mode & 0o077:  # an older server's, or made by someone else
                private.chmod(mode)

    def lock(self) -> IO[str]:
        """Takes the data directory for this process, until the returned file is closed.

        Raises BlockingIOError where another server has it: two would run the same jobs.
        """
        file = (self.root / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        return file

    def sweep(self, completed: Iterable[str], others: Iterable[str] = ()) -> None:
        """Removes what no job owns: half-written files, clips whose row never said complete, images without a job."""
        own = {path for job_id in completed for path in self._files(job_id)}
        own |= {self.start_image(job_id) for job_id in others}
        for path in (*self.videos.iterdir(), *self.inputs.iterdir()):
            if path not in own:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
