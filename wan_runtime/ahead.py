"""Work done ahead of a consumer by several threads, in order, and never more of it than a bounded amount of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def ahead(
    jobs: Iterable[Job],
    work: Callable[[Job], Result],
    cost: Callable[[Job], int],
    *,
    threads: int,
    budget: int,
) -> Generator[Result, None, None]:
    """The results of `work`, in the order of `jobs`.

    A job waits until the costs of all that are begun and not yet consumed, with its own, are within `budget`; one that
    is above it on its own runs alone. An error of `work` comes when its result would have, and ends what was begun.
    """
    if threads == 1:
        yield from map(work, jobs)
        return
    begun: deque[tuple[Future[Result], int]] = deque()
    spent = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            for job in jobs:
                price = cost(job)
                while begun and (spent + price > budget or len(begun) > 2 * threads):
                    future, paid = begun.popleft()
                    yield future.result()
                    del future  # its result is the consumer's now
                    spent -= paid
                begun.append((pool.submit(work, job), price))
                spent += price
            while begun:
                yield begun.popleft()[0].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
