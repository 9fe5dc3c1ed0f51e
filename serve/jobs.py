"""Jobs in SQLite: the one truth about what was asked and what became of it.

Write-ahead logging lets the HTTP threads read while the engine writes. Each schema change is one more script in
`MIGRATIONS`; the database's `user_version` says how many it has had. Only this process writes (the data directory is
locked), so one connection behind one lock is enough, and every method is one transaction.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed"]

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        seq          INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of arrival, and of the queue
        id           TEXT NOT NULL UNIQUE,
        status       TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
        model        TEXT NOT NULL,
        request      TEXT NOT NULL,                      -- the ClipRequest as JSON
        phase        TEXT,
        step         INTEGER NOT NULL DEFAULT 0,
        attempts     INTEGER NOT NULL DEFAULT 0,         -- how often a worker has begun it
        created_at   REAL NOT NULL,
        started_at   REAL,
        completed_at REAL,
        error_code   TEXT,
        error_message TEXT
    );
    CREATE INDEX jobs_by_status ON jobs (status, seq);
    """,
    """
    ALTER TABLE jobs ADD COLUMN owner TEXT;  -- the id of the API key that asked; null where no keys were in use
    CREATE INDEX jobs_by_owner ON jobs (owner, seq);
    """,
)
MAX_ATTEMPTS = 2  # a job that was running when the server stopped runs once more, then fails


@dataclass(frozen=True)
class Job:
    """One row. `request` is the ClipRequest's fields; times are seconds since the epoch; `step` counts done ones."""

    seq: int
    id: str
    status: Status
    model: str
    request: Mapping[str, Any]
    phase: str | None
    step: int
    attempts: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    error_code: str | None
    error_message: str | None
    owner: str | None = None

    @property
    def progress(self) -> int:
        """Percent of denoising steps done; 100 only once the file is there."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.step // int(self.request["num_inference_steps"]))


class JobStore:
    """The table of jobs. Safe to use from any thread of this process."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate(path)
        except BaseException:
            self._db.close()
            raise

    def _migrate(self, path: Path) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise ValueError(
                f"{path} has schema version {version}, and this wan-serve knows {len(MIGRATIONS)}: a newer one wrote "
                "it. Update wan-runtime, or give another --data-dir."
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        """Ends the connection; the store cannot be used after."""
        with self._lock:
            self._db.close()

    def _rows(self, sql: str, *values: object) -> list[Job]:
        with self._lock:
            found = self._db.execute(sql, values).fetchall()
        return [Job(**{**row, "request": json.loads(row["request"])}) for row in map(dict, found)]

    def _one(self, sql: str, *values: object) -> Job | None:
        rows = self._rows(sql, *values)
        return rows[0] if rows else None

    def add(self, job_id: str, model: str, request: Mapping[str, Any], *, owner: str | None = None) -> Job:
        """Puts a job at the end of the queue. `owner` is the id of the API key that asked, if one did."""
        [job] = self._rows(
            "INSERT INTO jobs (id, status, model, request, created_at, owner) "
            "VALUES (?, 'queued', ?, ?, ?, ?) RETURNING *",
            job_id,
            model,
            json.dumps(request),
            time.time(),
            owner,
        )
        return job

    def active(self, owner: str) -> int:
        """How many of an owner's jobs are queued or running."""
        with self._lock:
            sql = "SELECT count(*) FROM jobs WHERE owner = ? AND status IN ('queued', 'in_progress')"
            return int(self._db.execute(sql, (owner,)).fetchone()[0])

    def get(self, job_id: str) -> Job | None:
        """The job, or None."""
        return self._one("SELECT * FROM jobs WHERE id = ?", job_id)

    def page(
        self, *, after: Job | None, limit: int, newest_first: bool, owner: str | None = None
    ) -> list[Job]:
        """Up to `limit` jobs behind the cursor `after`, in order of arrival; those of `owner` if one is given."""
        order, past = ("DESC", "<") if newest_first else ("ASC", ">")
        conditions: dict[str, object] = {}
        if after:
            conditions[f"seq {past} ?"] = after.seq
        if owner is not None:
            conditions["owner = ?"] = owner
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        sql = f"SELECT * FROM jobs {where} ORDER BY seq {order} LIMIT ?"
        return self._rows(sql, *conditions.values(), limit)

    def completed_ids(self) -> list[str]:
        """The jobs that own a file."""
        return [job.id for job in self._rows("SELECT * FROM jobs WHERE status = 'completed'")]

    def queued_before(self, job: Job) -> int:
        """How many jobs are to run before this queued one."""
        with self._lock:
            sql = "SELECT count(*) FROM jobs WHERE status = 'queued' AND seq < ?"
            return int(self._db.execute(sql, (job.seq,)).fetchone()[0])

    def claim(self) -> Job | None:
        """Takes the oldest queued job to run it, or None."""
        return self._one(
            "UPDATE jobs SET status = 'in_progress', phase = 'starting', step = 0, attempts = attempts + 1, "
            "started_at = ? WHERE seq = (SELECT min(seq) FROM jobs WHERE status = 'queued') RETURNING *",
            time.time(),
        )

    def progress(self, job_id: str, *, phase: str, step: int) -> None:
        """Notes how far a running job is."""
        self._rows(
            "UPDATE jobs SET phase = ?, step = ? WHERE id = ? AND status = 'in_progress' RETURNING *",
            phase,
            step,
            job_id,
        )

    def complete(self, job_id: str) -> None:
        """A running job's file is in its place."""
        self._rows(
            "UPDATE jobs SET status = 'completed', phase = NULL, completed_at = ? "
            "WHERE id = ? AND status = 'in_progress' RETURNING *",
            time.time(),
            job_id,
        )

    def fail(self, job_id: str, code: str, message: str) -> None:
        """A running job ended without a clip, for this reason."""
        self._rows(
            "UPDATE jobs SET status = 'failed', phase = NULL, completed_at = ?, error_code = ?, error_message = ? "
            "WHERE id = ? AND status = 'in_progress' RETURNING *",
            time.time(),
            code,
            message,
            job_id,
        )

    def requeue(self, job_id: str) -> None:
        """Puts a running job back where it was in the queue, as if it had not begun: an orderly stop, not a failure."""
        self._rows(
            "UPDATE jobs SET status = 'queued', phase = NULL, step = 0, attempts = attempts - 1, started_at = NULL "
            "WHERE id = ? AND status = 'in_progress' RETURNING *",
            job_id,
        )

    def delete(self, job_id: str, *, unless: Status) -> bool:
        """Removes the row, unless it has the given status. Whether it did."""
        return bool(self._rows("DELETE FROM jobs WHERE id = ? AND status != ? RETURNING *", job_id, unless))

    def recover(self) -> None:
        """After a restart: what was running is queued again, or failed where that has been tried before."""
        self._rows(
            "UPDATE jobs SET status = 'failed', phase = NULL, completed_at = ?, error_code = 'server_restarted', "
            "error_message = 'The server stopped ' || attempts || ' times while this job ran.' "
            "WHERE status = 'in_progress' AND attempts >= ? RETURNING *",
            time.time(),
            MAX_ATTEMPTS,
        )
        self._rows(
            "UPDATE jobs SET status = 'queued', phase = NULL, step = 0 WHERE status = 'in_progress' RETURNING *"
        )
