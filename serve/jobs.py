"""Jobs in SQLite: the one truth about what was asked and what became of it.

Write-ahead logging keeps what was written when the process is killed. Only this process writes (the data directory is
locked), so one connection behind one lock is enough, and every method is one transaction. Reads have a connection of
their own: they see all that was committed, and wait for no writer's disk, so that a request may read where it stands.
`serve/schema.py` has the columns.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .schema import migrate
from .terms import DEFAULT_TERMS, KeyReused, QueueFull, Terms

Status = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)

BY_KEY = "SELECT * FROM jobs WHERE ifnull(owner, '') = ? AND idempotency_key = ?"
MAX_ATTEMPTS = 2  # a job whose worker or server ended under it is begun once more, then fails


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
    cost_seconds: float = 0.0
    idempotency_key: str | None = None
    fingerprint: str | None = None
    bytes: int = 0
    made_with: Mapping[str, Any] | None = None
    trace: Mapping[str, str] | None = None

    @property
    def progress(self) -> int:
        """Percent of denoising steps done; 100 only once the file is there."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.step // int(self.request["num_inference_steps"]))


class JobStore:
    """The table of jobs. Safe to use from any thread of this process."""

    def __init__(self, path: Path) -> None:
        self._lock, self._read_lock = threading.Lock(), threading.Lock()
        self._db, self._reader = _connect(path), _connect(path)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            migrate(self._db, path)
            self._reader.execute("PRAGMA query_only = ON")
        except BaseException:
            self._db.close()
            self._reader.close()
            raise

    def close(self) -> None:
        """Ends the connection; the store cannot be used after."""
        with self._lock, self._read_lock:
            self._db.close()
            self._reader.close()

    def _rows(self, sql: str, *values: object) -> list[Job]:
        with self._lock:
            return self._execute(sql, *values)

    def _execute(self, sql: str, *values: object) -> list[Job]:
        return [_job(dict(row)) for row in self._db.execute(sql, values).fetchall()]

    def _read(self, sql: str, *values: object) -> list[Job]:
        with self._read_lock:
            return [_job(dict(row)) for row in self._reader.execute(sql, values).fetchall()]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def add(
        self,
        job_id: str,
        model: str,
        request: Mapping[str, Any],
        *,
        owner: str | None = None,
        terms: Terms = DEFAULT_TERMS,
    ) -> Job:
        """Puts a job at the end of the queue, or gives the one that the same owner's same idempotency key made before.

        `owner` is the id of the API key that asked, if one did. What is waiting is counted in the transaction that adds
        to it, so the bound holds under any number of creates. An empty queue takes any job. Raises QueueFull and
        KeyReused.
        """
        with self._transaction():
            if terms.key is not None and (before := self._execute(BY_KEY, owner or "", terms.key)):
                if before[0].fingerprint != terms.fingerprint:
                    raise KeyReused
                return before[0]
            jobs, seconds = _waiting(self._db)
            full = jobs >= terms.max_queue_jobs or seconds + terms.cost_seconds > terms.max_queue_seconds
            if jobs and full:
                raise QueueFull(jobs, seconds)
            [job] = self._execute(
                "INSERT INTO jobs (id, status, model, request, created_at, owner, cost_seconds, idempotency_key, "
                "fingerprint, trace) VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
                job_id, model, json.dumps(request), time.time(), owner, terms.cost_seconds, terms.key,
                terms.fingerprint, json.dumps(terms.trace) if terms.trace is not None else None,
            )  # fmt: skip
            return job

    def by_key(self, owner: str | None, key: str) -> Job | None:
        """The job that an owner's idempotency key made, if it is still there."""
        return _first(self._read(BY_KEY, owner or "", key))

    def waiting(self, before: Job | None = None) -> tuple[int, float]:
        """How many jobs are queued, all or those before one, and the seconds that they were predicted to take."""
        with self._read_lock:
            return _waiting(self._reader, before.seq if before else float("inf"))

    def active(self, owner: str) -> int:
        """How many of an owner's jobs are queued or running."""
        with self._read_lock:
            sql = "SELECT count(*) FROM jobs WHERE owner = ? AND status IN ('queued', 'in_progress')"
            return int(self._reader.execute(sql, (owner,)).fetchone()[0])

    def get(self, job_id: str) -> Job | None:
        """The job, or None."""
        return _first(self._read("SELECT * FROM jobs WHERE id = ?", job_id))

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
        return self._read(sql, *conditions.values(), limit)

    def with_status(self, status: Status) -> list[Job]:
        """All jobs of a status, in order of arrival."""
        return self._read("SELECT * FROM jobs WHERE status = ? ORDER BY seq", status)

    def finished(self) -> list[Job]:
        """The jobs that have ended, either way, those that ended first coming first."""
        sql = "SELECT * FROM jobs WHERE status IN ('completed', 'failed') ORDER BY completed_at, seq"
        return self._read(sql)

    def next(self) -> Job | None:
        """The oldest queued job, or None."""
        return _first(self._rows("SELECT * FROM jobs WHERE status = 'queued' ORDER BY seq LIMIT 1"))

    def claim(self, made_with: Mapping[str, Any] | None = None, *, only: str | None = None) -> Job | None:
        """Takes the oldest queued job (if it is `only`) to run it with what `made_with` describes, or None."""
        rows = self._rows(
            "UPDATE jobs SET status = 'in_progress', phase = 'starting', step = 0, attempts = attempts + 1, "
            "started_at = ?, made_with = ? WHERE seq = (SELECT min(seq) FROM jobs WHERE status = 'queued') "
            "AND id = ifnull(?, id) RETURNING *",
            time.time(),
            json.dumps(made_with) if made_with is not None else None,
            only,
        )
        return _first(rows)

    def progress(self, job_id: str, *, phase: str, step: int) -> None:
        """Notes how far a running job is."""
        self._rows(
            "UPDATE jobs SET phase = ?, step = ? WHERE id = ? AND status = 'in_progress' RETURNING *",
            phase,
            step,
            job_id,
        )

    def complete(self, job_id: str, *, size: int = 0) -> Job | None:
        """A running job's files are in their place, `size` bytes of them. The job, if it was one."""
        rows = self._rows(
            "UPDATE jobs SET status = 'completed', phase = NULL, completed_at = ?, bytes = ? "
            "WHERE id = ? AND status = 'in_progress' RETURNING *",
            time.time(),
            size,
            job_id,
        )
        return _first(rows)

    def fail(self, job_id: str, code: str, message: str, *, status: Status = "in_progress") -> Job | None:
        """A running job (or one of another `status`) ended without a clip, for this reason. The job, if it was one."""
        rows = self._rows(
            "UPDATE jobs SET status = 'failed', phase = NULL, completed_at = ?, error_code = ?, error_message = ? "
            "WHERE id = ? AND status = ? RETURNING *",
            time.time(),
            code,
            message,
            job_id,
            status,
        )
        return _first(rows)

    def requeue(self, job_id: str, *, counts: bool) -> None:
        """Puts a running job back where it was in the queue. After an orderly stop the attempt does not count."""
        self._rows(
            "UPDATE jobs SET status = 'queued', phase = NULL, step = 0, attempts = attempts - ?, started_at = NULL "
            "WHERE id = ? AND status = 'in_progress' RETURNING *",
            0 if counts else 1,
            job_id,
        )

    def interrupted(self, job: Job, code: str, reason: str) -> None:
        """A worker or a server ended under this running job: it is begun once more, and failed the second time."""
        if job.attempts < MAX_ATTEMPTS:
            self.requeue(job.id, counts=True)
            return
        message = f"{reason} It had been begun {job.attempts} times, so it is not begun again."
        self.fail(job.id, code, message)

    def delete(self, job_id: str, *, unless: Status) -> bool:
        """Removes the row, unless it has the given status. Whether it did."""
        return bool(self._rows("DELETE FROM jobs WHERE id = ? AND status != ? RETURNING *", job_id, unless))

    def recover(self, size_of: Callable[[str], int]) -> list[str]:
        """After a restart: what was running is completed if its files are there (`size_of` gives their bytes, 0 for
        none), else queued again, or failed where that has been tried before. The ids of the jobs that ended so."""
        running = self.with_status("in_progress")
        for job in running:
            if size := size_of(job.id):
                self.complete(job.id, size=size)
            else:
                where = f"in the phase {job.phase!r}, after {job.step} steps"
                self.interrupted(job, "server_restarted", f"The server ended while this job ran, {where}.")
        return [
            job.id for job in map(self.get, (job.id for job in running)) if job and job.status != "queued"
        ]


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    db.row_factory = sqlite3.Row
    return db


def _waiting(db: sqlite3.Connection, before: float = float("inf")) -> tuple[int, float]:
    sql = "SELECT count(*), coalesce(sum(cost_seconds), 0) FROM jobs WHERE status = 'queued' AND seq < ?"
    jobs, seconds = db.execute(sql, (before,)).fetchone()
    return int(jobs), float(seconds)


def _first(jobs: list[Job]) -> Job | None:
    return jobs[0] if jobs else None


def _job(row: dict[str, Any]) -> Job:
    row["request"] = json.loads(row["request"])
    for name in ("made_with", "trace"):
        row[name] = json.loads(row[name]) if row[name] else None
    return Job(**row)
