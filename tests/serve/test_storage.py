"""Paths come from job ids alone, and the data directory belongs to one server at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_runtime.serve.jobs import JobStore
from wan_runtime.serve.storage import ID, Storage, new_id


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path / "data")
    storage.prepare()
    return storage


def test_ids_are_distinct_and_of_the_form_that_paths_accept(storage: Storage) -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(ID.fullmatch(one) for one in ids)
    assert all(storage.video(one).parent == storage.videos for one in ids)


@pytest.mark.parametrize(
    "job_id",
    ["../x", "", "video_", f"video_{'0' * 31}/", "/etc/passwd", f"video_{'0' * 32}\n", f"VIDEO_{'0' * 32}"],
)
def test_nothing_but_an_id_becomes_a_path(storage: Storage, job_id: str) -> None:
    with pytest.raises(ValueError, match="not a job id"):
        storage.video(job_id)


def test_the_folders_are_private(storage: Storage) -> None:
    assert [folder.stat().st_mode & 0o077 for folder in (storage.root, storage.videos)] == [0, 0]


def test_in_a_folder_that_others_may_read_they_read_neither_prompts_nor_clips(tmp_path: Path) -> None:
    """As an older server left it, or as a container's volume comes."""
    root = tmp_path / "data"
    (root / "videos").mkdir(parents=True)
    (root / "jobs.sqlite3").touch()
    for path, mode in ((root, 0o755), (root / "videos", 0o755), (root / "jobs.sqlite3", 0o644)):
        path.chmod(mode)
    storage = Storage(root)
    storage.prepare()
    store = JobStore(storage.database)
    store.add(new_id(), "wan-tiny", {"prompt": "a secret"})
    files = list(root.iterdir())
    assert {"jobs.sqlite3", "jobs.sqlite3-wal", "videos", "inputs"} <= {path.name for path in files}
    assert [path.name for path in files if path.stat().st_mode & 0o077] == []
    store.close()


def test_a_sweep_removes_what_no_job_owns(storage: Storage) -> None:
    kept, orphan = new_id(), new_id()
    for one in (kept, orphan):
        storage.video(one).write_bytes(b"clip")
        storage.thumbnail(one).write_bytes(b"still")
    (storage.videos / f".{kept}.mp4.77.part").write_bytes(b"half")
    storage.sweep([kept])
    assert set(storage.videos.iterdir()) == {storage.video(kept), storage.thumbnail(kept)}


def test_a_job_has_a_size_only_once_its_clip_which_comes_last_is_there(storage: Storage) -> None:
    one = new_id()
    storage.thumbnail(one).write_bytes(b"still")
    storage.spritesheet(one).write_bytes(b"sheet")
    assert storage.size(one) == 0
    storage.video(one).write_bytes(b"clip")
    assert storage.size(one) == len(b"still" + b"sheet" + b"clip")
    storage.delete(one)
    assert storage.size(one) == 0 and not list(storage.videos.iterdir())


def test_deleting_twice_is_harmless(storage: Storage) -> None:
    one = new_id()
    storage.video(one).write_bytes(b"clip")
    storage.delete(one)
    storage.delete(one)
    assert not storage.video(one).exists()


def test_a_second_lock_is_refused_until_the_first_is_given_back(storage: Storage) -> None:
    first = storage.lock()
    with pytest.raises(BlockingIOError):
        storage.lock()
    first.close()
    storage.lock().close()
