"""API keys in a file, hashed: whoever reads it learns who has a key and what it may do, but no key.

A key reads `wan_<id>_<secret>`: the id finds its one record, so that a request costs one scrypt at most, and the secret
is 256 random bits. The file is JSON, readable by its owner alone, and replaced as a whole by every change.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from anyio import CapacityLimiter

from wan_runtime import written_aside

KEY = re.compile(r"wan_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")
COST = {"n": 2**14, "r": 8, "p": 1}  # scrypt's: 16 MiB and some 30 ms a try


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key's record. `salt` and `digest` are hex; a limit of None is no limit; `created_at` in epoch seconds."""

    id: str
    name: str
    salt: str
    digest: str
    created_at: int
    max_active: int | None = None  # jobs queued or running at once
    per_minute: int | None = None  # creates a minute

    def opens(self, secret: str) -> bool:
        """Whether this is the record's secret, in the same time whichever way it is wrong."""
        return hmac.compare_digest(_digest(secret, self.salt), self.digest)


def make(name: str, *, max_active: int | None = None, per_minute: int | None = None) -> tuple[str, ApiKey]:
    """A new key and its record. The key itself is kept nowhere. Raises ValueError for a name that is not plain."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"The name {name[:80]!r} is not plain: up to 64 letters, digits, spaces and . _ @ -, and not one of the "
            "last five first."
        )
    number, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
    record = ApiKey(
        id=number,
        name=name,
        salt=salt,
        digest=_digest(secret, salt),
        created_at=int(time.time()),
        max_active=max_active,
        per_minute=per_minute,
    )
    return f"wan_{number}_{secret}", record


def find(keys: dict[str, ApiKey], presented: str) -> ApiKey | None:
    """The record of a key that a client sent, or None. Takes some 30 ms where the id is known."""
    match = KEY.fullmatch(presented)
    record = keys.get(match[1]) if match else None
    return record if match and record and record.opens(match[2]) else None


def read(path: Path) -> dict[str, ApiKey]:
    """The records by id. Raises FileNotFoundError, or ValueError with the reason for a file that is none of ours."""
    text = path.read_text()
    try:
        records = [ApiKey(**record) for record in json.loads(text)["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file that `wan-serve keys add` wrote: {error!r}.") from None
    return {record.id: record for record in records}


def add(path: Path, record: ApiKey) -> None:
    """Puts a record into the file, which is created if it is not there. Raises ValueError if the name is taken."""
    with _changing(path) as keys:
        if any(known.name == record.name for known in keys.values()):
            raise ValueError(
                f"{path} has a key named {record.name!r} already. Revoke it first, or take another name."
            )
        keys[record.id] = record


def revoke(path: Path, which: str) -> ApiKey:
    """Takes the record with this name or id out of the file and returns it. Raises ValueError if there is none."""
    with _changing(path) as keys:
        for record in keys.values():
            if which in (record.id, record.name):
                return keys.pop(record.id)
        known = ", ".join(record.name for record in keys.values()) or "none"
        raise ValueError(f"{path} has no key named {which[:80]!r}. It has: {known}.")


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, ApiKey]]:
    """The records, to be changed in place; written back, as a whole and on the disk, where nothing was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: two commands at once must not lose a key
        keys = read(path) if path.exists() else {}
        yield keys
        text = json.dumps({"keys": [asdict(record) for record in keys.values()]}, indent=1)
        with written_aside(path, mode=0o600) as aside:
            aside.write_text(text + "\n")


def _digest(secret: str, salt: str) -> str:
    return hashlib.scrypt(secret.encode(), salt=bytes.fromhex(salt), **COST).hex()


class KeyRing:
    """The keys of a running server. The file is read again when it has changed: a revoked key is out at once.

    A key that was found stays known, by its SHA-256 and in this process's memory only, so that a poll costs no scrypt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._known: dict[bytes, str] = {}
        self.one_at_a_time = CapacityLimiter(1)  # guesses must not take every core, nor 16 MiB each
        self.creates: defaultdict[str, deque[float]] = defaultdict(deque)  # when each key last created
        self.refresh()

    def refresh(self) -> None:
        """Reads the file if it is another than last time. Raises what `read` does; the old keys then stay."""
        status = self._path.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._stamp = stamp
            before, self._keys = self._keys, read(self._path)
            same = {number for number, record in self._keys.items() if before.get(number) == record}
            self._known = {proof: number for proof, number in list(self._known.items()) if number in same}

    def known(self, presented: str) -> ApiKey | None:
        """The record of a key that was found before and is still valid, at once; None says nothing."""
        return self._keys.get(self._known.get(hashlib.sha256(presented.encode()).digest(), ""))

    def find(self, presented: str) -> ApiKey | None:
        """The record of a key, or None. It may take a while: not for the event loop."""
        record = find(self._keys, presented)
        if record is not None:
            self._known[hashlib.sha256(presented.encode()).digest()] = record.id
        return record
