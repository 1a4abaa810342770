"""A job per number in several processes, the results in order: what comes out does not depend on how many work."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

R = TypeVar("R")
CHUNK = 32
_job: Callable[[int], Any] | None = None


def ordered(job: Callable[[int], R], count: int, workers: int) -> Iterator[R]:
    """Yield ``job(0)`` … ``job(count - 1)``; ``job`` is sent to each of ``workers`` processes once."""
    if workers <= 1 or count <= CHUNK:
        yield from map(job, range(count))
        return
    # spawned, not forked: the mask library keeps threads, which a fork would leave in an unknown state
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_receive, initargs=(job,)) as pool:
        yield from pool.map(_run, range(count), chunksize=CHUNK)


def _receive(job: Callable[[int], Any]) -> None:
    global _job
    _job = job


def _run(number: int) -> Any:
    assert _job is not None
    return _job(number)
