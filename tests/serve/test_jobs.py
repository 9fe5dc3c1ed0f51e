"""The job table: what each transition allows, and what a restart makes of it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_runtime.serve.jobs import MIGRATIONS, Job, JobStore

REQUEST = {"prompt": "a circle", "num_inference_steps": 30}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[JobStore]:
    store = JobStore(path)
    yield store
    store.close()


def add(store: JobStore, *names: str) -> list[Job]:
    return [store.add(name, "wan-tiny", REQUEST) for name in names]


def claimed(store: JobStore) -> Job:
    job = store.claim()
    assert job is not None
    return job


def get(store: JobStore, name: str) -> Job:
    job = store.get(name)
    assert job is not None
    return job


def test_a_job_runs_from_queued_to_completed(store: JobStore) -> None:
    [job] = add(store, "a")
    assert (job.status, job.progress, job.request) == ("queued", 0, REQUEST)
    assert (claimed(store).id, get(store, "a").status, get(store, "a").phase) == (
        "a",
        "in_progress",
        "starting",
    )
    store.progress("a", phase="denoise", step=10)
    assert (get(store, "a").progress, get(store, "a").phase) == (33, "denoise")
    store.progress("a", phase="decode", step=30)
    assert get(store, "a").progress == 99  # all steps are done and the file is not there
    store.complete("a")
    done = get(store, "a")
    assert (done.status, done.progress, done.phase) == ("completed", 100, None)
    assert done.completed_at is not None and done.started_at is not None
    assert done.created_at <= done.started_at <= done.completed_at


def test_claims_take_the_oldest_and_each_job_once(store: JobStore) -> None:
    add(store, "a", "b", "c")
    taken = []

    def take() -> None:
        while job := store.claim():
            taken.append(job.id)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ["a", "b", "c"]
    assert store.claim() is None


def test_only_a_running_job_can_end(store: JobStore) -> None:
    add(store, "a")
    store.complete("a")
    store.fail("a", "x", "y")
    assert get(store, "a").status == "queued"
    claimed(store)
    store.fail("a", "worker_died", "it died")
    store.complete("a")
    failed = get(store, "a")
    assert (failed.status, failed.error_code, failed.error_message) == ("failed", "worker_died", "it died")


def test_a_running_job_is_not_deleted(store: JobStore) -> None:
    add(store, "a", "b")
    claimed(store)
    assert not store.delete("a", unless="in_progress")
    assert store.delete("b", unless="in_progress")
    assert not store.delete("b", unless="in_progress")
    assert (get(store, "a").id, store.get("b")) == ("a", None)


def test_pages_follow_a_cursor_both_ways(store: JobStore) -> None:
    jobs = add(store, *"abcde")

    def names(after: Job | None, newest_first: bool) -> str:
        return "".join(job.id for job in store.page(after=after, limit=2, newest_first=newest_first))

    assert [names(None, True), names(jobs[3], True), names(jobs[1], True)] == ["ed", "cb", "a"]
    assert [names(None, False), names(jobs[1], False), names(jobs[4], False)] == ["ab", "cd", ""]


def test_a_place_in_the_queue_counts_who_is_before(store: JobStore) -> None:
    jobs = add(store, *"abc")
    claimed(store)
    assert [store.queued_before(job) for job in jobs[1:]] == [0, 1]


def test_a_running_job_gets_one_more_chance_after_a_restart(store: JobStore, path: Path) -> None:
    add(store, "a", "b")
    claimed(store)
    store.progress("a", phase="denoise", step=3)
    store.recover()
    again = get(store, "a")
    assert (again.status, again.step, again.phase, again.attempts) == ("queued", 0, None, 1)
    assert claimed(store).id == "a"  # before b, where it was
    store.recover()
    failed = get(store, "a")
    assert (failed.status, failed.error_code) == ("failed", "server_restarted")
    assert failed.error_message == "The server stopped 2 times while this job ran."
    assert get(store, "b").status == "queued"


def test_an_orderly_stop_counts_as_no_attempt(store: JobStore) -> None:
    add(store, "a")
    claimed(store)
    store.requeue("a")
    assert (get(store, "a").status, get(store, "a").attempts) == ("queued", 0)


def test_rows_survive_closing(path: Path) -> None:
    first = JobStore(path)
    add(first, "a")
    first.close()
    second = JobStore(path)
    assert get(second, "a").request == REQUEST
    second.close()


def test_each_migration_is_made_once_and_a_newer_schema_is_refused(store: JobStore, path: Path) -> None:
    add(store, "a")
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        JobStore(path).close()
        assert db.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(ValueError, match="newer"):
        JobStore(path)


def test_an_owner_sees_and_counts_only_its_own(store: JobStore) -> None:
    for name, owner in (("a", "k1"), ("b", "k2"), ("c", "k1"), ("d", None)):
        assert store.add(name, "wan-tiny", REQUEST, owner=owner).owner == owner
    everything = store.page(after=None, limit=9, newest_first=False)
    assert [job.id for job in everything] == ["a", "b", "c", "d"]
    mine = store.page(after=None, limit=9, newest_first=True, owner="k1")
    assert [job.id for job in mine] == ["c", "a"]
    assert [job.id for job in store.page(after=mine[0], limit=9, newest_first=True, owner="k1")] == ["a"]
    assert claimed(store).id == "a"
    assert (store.active("k1"), store.active("k2"), store.active("k3")) == (2, 1, 0)
    store.complete("a")
    assert store.active("k1") == 1


def test_a_database_from_before_owners_is_brought_up_to_date(path: Path) -> None:
    db = sqlite3.connect(path)
    db.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1;")
    db.execute(
        "INSERT INTO jobs (id, status, model, request, created_at) VALUES ('a', 'queued', 'm', '{}', 1)"
    )
    db.commit()
    db.close()
    store = JobStore(path)
    try:
        assert get(store, "a").owner is None
    finally:
        store.close()
