"""The database's schema, as the scripts that made it: one a version, run once each, never changed after a release."""

from __future__ import annotations

import sqlite3
from pathlib import Path

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
    """
    ALTER TABLE jobs ADD COLUMN cost_seconds REAL NOT NULL DEFAULT 0;  -- as predicted when it was asked for
    ALTER TABLE jobs ADD COLUMN idempotency_key TEXT;                  -- the client's name for this create
    ALTER TABLE jobs ADD COLUMN fingerprint TEXT;                      -- of the body that came with that key
    ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;      -- of its files, once it is completed
    ALTER TABLE jobs ADD COLUMN made_with TEXT;                        -- what decided the clip, as JSON
    CREATE UNIQUE INDEX jobs_by_key ON jobs (ifnull(owner, ''), idempotency_key);  -- nulls are distinct
    """,
    """
    ALTER TABLE jobs ADD COLUMN trace TEXT;  -- the client's W3C trace context, as JSON; null where spans were not sent
    """,
)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Brings the database to the newest version, each step whole or not at all.

    Raises ValueError where a newer wan-serve wrote it.
    """
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise ValueError(
            f"{path} has schema version {version}, and this wan-serve knows {len(MIGRATIONS)}: a newer one wrote "
            "it. Update wan-runtime, or give another --data-dir."
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
