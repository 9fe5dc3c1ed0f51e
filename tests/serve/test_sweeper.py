"""Retention: by age and by bytes, the row and its files together, and nothing that still runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_runtime.serve.events import Hub
from wan_runtime.serve.forecast import Forecast
from wan_runtime.serve.jobs import JobStore
from wan_runtime.serve.settings import Settings
from wan_runtime.serve.state import EngineState
from wan_runtime.serve.storage import Storage, new_id
from wan_runtime.serve.sweeper import Sweeper, expires_at
from wan_runtime.serve.telling import Teller

DAY = 86400.0
REQUEST = {"prompt": "a circle", "num_inference_steps": 2}


class Shelf:
    """A store and a storage with some finished clips of 1 MiB."""

    def __init__(self, root: Path, **options: float) -> None:
        self.settings = Settings(data_dir=root, **options)  # type: ignore[arg-type]
        self.storage = Storage(root)
        self.storage.prepare()
        self.store = JobStore(self.storage.database)
        state = EngineState()
        self.tell = Teller(self.store, Forecast(self.store, lambda: state), lambda: state)
        self.sweeper = Sweeper(self.settings, self.store, self.storage, self.tell)

    def finish(self) -> str:
        job = self.store.add(new_id(), "wan-tiny", REQUEST)
        self.store.claim()
        self.storage.video(job.id).write_bytes(bytes(2**20))
        self.store.complete(job.id, size=self.storage.size(job.id))
        return job.id

    def left(self) -> list[str]:
        rows = [job.id for job in self.store.with_status("completed")]
        assert sorted(rows) == sorted(path.stem for path in self.storage.videos.iterdir())
        return rows

    def ends(self, job_id: str) -> float:
        job = self.store.get(job_id)
        assert job is not None and job.completed_at is not None
        return expires_at(job, self.settings) or 0.0


def test_what_is_too_old_goes_at_the_time_that_was_told(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, keep_days=2, keep_gib=0)
    one = shelf.finish()
    shelf.sweeper.sweep(shelf.ends(one) - 1)
    assert shelf.left() == [one]
    shelf.sweeper.sweep(shelf.ends(one))
    assert shelf.left() == [] and shelf.store.get(one) is None
    [event] = shelf.tell.hub.after(one, 0)
    assert event.name == "deleted"
    shelf.store.close()


def test_the_oldest_go_where_all_are_too_much(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, keep_days=0, keep_gib=2.5 / 1024)
    made = [shelf.finish() for _ in range(4)]
    shelf.sweeper.sweep(1e12)
    assert shelf.left() == made[2:]
    shelf.store.close()


def test_zero_keeps_everything_and_waiting_jobs_are_never_swept(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, keep_days=0, keep_gib=0)
    made = [shelf.finish() for _ in range(2)]
    queued = shelf.store.add(new_id(), "wan-tiny", REQUEST)
    running = shelf.store.claim()
    assert running is not None and running.id == queued.id
    shelf.sweeper.sweep(1e12)
    assert shelf.left() == made
    assert shelf.store.get(queued.id) is not None
    shelf.store.close()


@pytest.mark.parametrize("kept", [1, 600])
def test_events_are_kept_within_bounds(kept: int) -> None:
    hub = Hub()
    for number in range(kept):
        hub.publish("a", "step", {"step": number})
        hub.publish("a", "preview", {"jpeg": number})
    told = hub.after("a", 0)
    assert [event.data["jpeg"] for event in told if event.name == "preview"] == [kept - 1]
    assert len(told) == min(kept + 1, 512)
