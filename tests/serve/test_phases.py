"""When the phases of a job began and ended, from its row and from what the worker said."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from wan_runtime.serve.jobs import Job, JobStore
from wan_runtime.serve.phases import RUNNING, Phase, Timeline

REQUEST = {"prompt": "a circle", "num_inference_steps": 3}


class Line:
    """A store, its timeline, and what that has told of each job that ended."""

    def __init__(self, path: Path) -> None:
        self.store, self.timeline = JobStore(path), Timeline()
        self.told: dict[str, Sequence[Phase]] = {}
        self.timeline.listeners.append(lambda job, phases: self.told.update({job.id: phases}))

    def add(self, job_id: str) -> None:
        self.store.add(job_id, "wan-tiny", REQUEST)
        time.sleep(0.002)

    def enter(self, phase: str) -> None:
        self.timeline.entered(phase)
        time.sleep(0.002)

    def run(self, *names: str) -> None:
        job = self.store.claim()
        assert job is not None
        for name in names:
            self.timeline.heard(job, name)
            time.sleep(0.002)

    def end(self, job: Job | None) -> Sequence[Phase]:
        assert job is not None
        self.timeline.heard(job, "failed" if job.error_code else "done")
        phases = self.told[job.id]
        assert all(one.end <= other.begin for one, other in itertools.pairwise(phases))
        assert all(phase.begin < phase.end for phase in phases)
        assert phases[-1].end == job.completed_at
        return phases


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path / "jobs.sqlite3")
    yield line
    line.store.close()


def names(phases: Sequence[Phase]) -> list[str]:
    return [phase.name for phase in phases]


def test_a_job_waits_for_others_and_for_its_model_and_then_runs(line: Line) -> None:
    line.enter("ready")
    line.add("a")
    for phase in ("loading", "warming", "ready", "draining"):
        line.enter(phase)
    line.run("text", "denoise", "step", "step", "decode", "encode")
    row = line.store.complete("a", size=1)
    phases = line.end(row)
    assert row is not None and row.started_at is not None
    assert names(phases) == ["queued", "loading", "queued", *RUNNING]
    assert (phases[0].begin, phases[3].begin) == (row.created_at, row.started_at)
    assert {phase.error for phase in phases} == {None}


def test_the_phase_in_which_a_job_fails_has_the_error(line: Line) -> None:
    line.enter("ready")
    for name in ("a", "b"):
        line.add(name)
    line.run("text", "denoise")
    ran = line.end(line.store.fail("a", "out_of_memory", "There was not enough."))
    assert [(phase.name, phase.error) for phase in ran] == [
        ("queued", None),
        ("text", None),
        ("denoise", "out_of_memory"),
    ]
    dropped = line.end(line.store.fail("b", "cancelled", "It was cancelled.", status="queued"))
    assert names(dropped) == ["queued"]


def test_a_job_whose_worker_died_waits_for_another_and_goes_through_its_phases_again(line: Line) -> None:
    line.enter("ready")
    line.add("a")
    line.run("text", "denoise")
    line.enter("restarting")
    line.store.requeue("a", counts=True)
    again = line.store.get("a")
    assert again is not None
    line.timeline.heard(again, "loading")
    time.sleep(0.002)
    line.enter("ready")
    line.run("text", "denoise", "decode", "encode")
    phases = line.end(line.store.complete("a"))
    assert names(phases) == ["queued", "text", "denoise", "loading", "queued", *RUNNING]
    assert [phase.name for phase in phases if phase.error == "worker_died"] == ["denoise"]


def test_what_was_before_this_server_is_in_no_phase(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    before = JobStore(path)
    for name in ("ran", "waited"):
        before.add(name, "wan-tiny", REQUEST)
    before.claim()
    before.close()
    line = Line(path)
    [ended] = line.store.recover(lambda job_id: 7)
    told: list[Sequence[Phase]] = []
    line.timeline.listeners.append(lambda job, phases: told.append(phases))
    row = line.store.get(ended)
    assert row is not None and row.id == "ran"
    line.timeline.heard(row, "done")
    assert told == [[]]
    started = time.time()
    line.enter("ready")
    line.run("text")
    phases = line.end(line.store.complete("waited"))
    assert names(phases) == ["loading", "queued", "text"]
    assert phases[0].begin > before_start(line) and phases[0].begin < started
    line.store.close()


def before_start(line: Line) -> float:
    job = line.store.get("waited")
    assert job is not None
    return job.created_at
