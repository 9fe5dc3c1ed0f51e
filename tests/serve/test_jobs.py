"""The job table: what each transition allows, and what a restart makes of it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_runtime.serve.jobs import Job, JobStore
from wan_runtime.serve.schema import MIGRATIONS
from wan_runtime.serve.terms import KeyReused, QueueFull, Terms

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
    assert [store.waiting(job)[0] for job in jobs[1:]] == [0, 1]
    assert store.waiting()[0] == 2


def nothing(job_id: str) -> int:
    """The bytes of a job's files where there are none."""
    return 0


def test_a_running_job_whose_file_is_whole_is_complete_after_a_restart(store: JobStore) -> None:
    add(store, "a", "b")
    claimed(store)
    store.recover({"a": 77}.__getitem__)
    done = get(store, "a")
    assert (done.status, done.bytes, done.progress) == ("completed", 77, 100)
    assert get(store, "b").status == "queued"


def test_a_job_whose_worker_ended_is_begun_once_more_then_failed_with_the_reason(store: JobStore) -> None:
    add(store, "a")
    store.interrupted(claimed(store), "worker_died", "It was killed.")
    assert (get(store, "a").status, get(store, "a").attempts) == ("queued", 1)
    store.interrupted(claimed(store), "worker_died", "It was killed.")
    failed = get(store, "a")
    assert (failed.status, failed.error_code, failed.attempts) == ("failed", "worker_died", 2)
    assert failed.error_message == "It was killed. It had been begun 2 times, so it is not begun again."


def test_the_queue_is_bounded_by_predicted_seconds_under_concurrent_creates(store: JobStore) -> None:
    taken: list[str] = []
    full: list[QueueFull] = []

    def ask(name: str) -> None:
        try:
            terms = Terms(cost_seconds=10, max_queue_seconds=45)
            taken.append(store.add(name, "wan-tiny", REQUEST, terms=terms).id)
        except QueueFull as error:
            full.append(error)

    threads = [threading.Thread(target=ask, args=(f"v{n}",)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(full)) == (4, 8)
    assert all((error.jobs, error.seconds) == (4, 40) for error in full)


def test_an_empty_queue_takes_any_job(store: JobStore) -> None:
    store.add("a", "wan-tiny", REQUEST, terms=Terms(cost_seconds=99, max_queue_seconds=1))
    with pytest.raises(QueueFull):
        store.add("b", "wan-tiny", REQUEST, terms=Terms(max_queue_jobs=1))


def test_an_idempotency_key_makes_one_job_for_each_owner(store: JobStore) -> None:
    terms = Terms(key="k", fingerprint="f")
    first = store.add("a", "wan-tiny", REQUEST, owner="x", terms=terms)
    assert store.add("b", "wan-tiny", REQUEST, owner="x", terms=terms).id == first.id == "a"
    assert store.add("c", "wan-tiny", REQUEST, owner="y", terms=terms).id == "c"
    assert store.add("d", "wan-tiny", REQUEST, terms=terms).id == "d"
    assert store.add("e", "wan-tiny", REQUEST, terms=terms).id == "d"
    with pytest.raises(KeyReused):
        store.add("f", "wan-tiny", REQUEST, owner="x", terms=Terms(key="k", fingerprint="g"))
    assert store.get("f") is None
    store.delete("a", unless="in_progress")
    assert store.by_key("x", "k") is None


def test_what_a_clip_was_made_with_is_kept_from_its_beginning(store: JobStore) -> None:
    add(store, "a")
    job = store.claim({"model": "wan-tiny"})
    assert job is not None and job.made_with == {"model": "wan-tiny"}


def test_every_older_schema_is_migrated_with_its_jobs(tmp_path: Path) -> None:
    for version in range(1, len(MIGRATIONS)):
        path = tmp_path / f"{version}.sqlite3"
        with sqlite3.connect(path) as db:
            for script in MIGRATIONS[:version]:
                db.executescript(script)
            db.execute(
                "INSERT INTO jobs (id, status, model, request, created_at) VALUES ('a', 'queued', 'm', '{}', 1)"
            )
            db.execute(f"PRAGMA user_version = {version}")
        db.close()
        store = JobStore(path)
        job = get(store, "a")
        assert (job.status, job.owner, job.cost_seconds, job.bytes) == ("queued", None, 0, 0)
        store.close()


def test_a_running_job_gets_one_more_chance_after_a_restart(store: JobStore, path: Path) -> None:
    add(store, "a", "b")
    claimed(store)
    store.progress("a", phase="denoise", step=3)
    store.recover(nothing)
    again = get(store, "a")
    assert (again.status, again.step, again.phase, again.attempts) == ("queued", 0, None, 1)
    assert claimed(store).id == "a"  # before b, where it was
    store.progress("a", phase="denoise", step=7)
    store.recover(nothing)
    failed = get(store, "a")
    assert (failed.status, failed.error_code) == ("failed", "server_restarted")
    assert failed.error_message is not None
    assert "in the phase 'denoise', after 7 steps" in failed.error_message
    assert "begun 2 times" in failed.error_message
    assert get(store, "b").status == "queued"


def test_an_orderly_stop_counts_as_no_attempt(store: JobStore) -> None:
    add(store, "a")
    claimed(store)
    store.requeue("a", counts=False)
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
