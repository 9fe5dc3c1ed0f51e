"""Work ahead of a consumer: in order, within a budget, and errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from wan_runtime.ahead import ahead


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_whatever_is_ready_first(threads: int) -> None:
    def slow_first(job: int) -> int:
        time.sleep(0.02 if job % 3 == 0 else 0)
        return job * job

    done = list(ahead(range(20), slow_first, lambda job: 1, threads=threads, budget=6))
    assert done == [job * job for job in range(20)]


def test_threads_work_at_the_same_time() -> None:
    met = threading.Barrier(3, timeout=20)  # broken unless three jobs are in work together
    assert len(list(ahead(range(6), lambda job: met.wait(), lambda job: 1, threads=3, budget=10))) == 6


@pytest.mark.parametrize(("budget", "most"), [(3, 3), (1, 1), (100, 9)])
def test_what_is_begun_and_not_consumed_stays_within_the_budget(budget: int, most: int) -> None:
    held, peak, lock = 0, 0, threading.Lock()

    def work(job: int) -> int:
        nonlocal held, peak
        with lock:
            held += 1
            peak = max(peak, held)
        return job

    for _ in ahead(range(40), work, lambda job: 1, threads=4, budget=budget):
        time.sleep(0.002)
        with lock:
            held -= 1
    assert 1 <= peak <= most + 1  # the one that the consumer has just been given is still counted here


def test_a_job_above_the_budget_runs_alone() -> None:
    running, together = 0, []
    lock = threading.Lock()

    def work(job: int) -> int:
        nonlocal running
        with lock:
            running += 1
            together.append((job, running))
        time.sleep(0.01)
        with lock:
            running -= 1
        return job

    assert list(ahead([1, 50, 2], work, lambda job: job, threads=3, budget=10)) == [1, 50, 2]
    assert (50, 1) in together


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_in_its_place_and_ends_the_rest(threads: int) -> None:
    def work(job: int) -> int:
        if job == 3:
            raise ValueError("job 3")
        return job

    def jobs() -> Iterator[int]:
        for job in range(1000):
            asked.append(job)
            yield job

    asked: list[int] = []
    seen = []
    with pytest.raises(ValueError, match="job 3"):
        for result in ahead(jobs(), work, lambda job: 1, threads=threads, budget=4):
            seen.append(result)
    assert seen == [0, 1, 2]
    assert len(asked) < 20
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]
