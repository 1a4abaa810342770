"""Collated batches of one rank, step by step, prepared by worker processes."""

import ctypes
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence

import torch.utils.data

from xseg.data.collate import collate
from xseg.data.dataset import Dataset
from xseg.data.mixture import Item, Plan
from xseg.errors import RunError, UserError
from xseg.types import Batch


class MicroBatches(torch.utils.data.Dataset):
    """The batches of one rank by (step, micro-batch); a UserError is returned, not raised.

    The DataLoader would rewrap an exception of a worker and bury its message under a traceback.
    """

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, rank: int) -> None:
        self.datasets, self.plan, self.rank = datasets, plan, rank

    def __getitem__(self, place: tuple[int, int]) -> Batch | UserError:
        try:
            return collate([self.datasets[item.dataset].get(item.sample, item.epoch) for item in self.items(place)])
        except UserError as error:
            return error

    def items(self, place: tuple[int, int]) -> list[Item]:
        """Return the draws of one micro-batch."""
        step, micro = place
        return self.plan.batch(step)[self.rank][micro]


def keys(datasets: Sequence[Dataset], items: Sequence[Item]) -> list[str]:
    """Sample keys of draws; reads annotations only."""
    return [datasets[item.dataset].sample(item.sample).key for item in items]


def loader(
    datasets: Sequence[Dataset], plan: Plan, rank: int, start_step: int, stop_step: int, num_workers: int = 0
) -> Generator[list[Batch], None, None]:
    """Yield the micro-batches of each step from ``start_step`` up to, not including, ``stop_step``.

    The batches are the same whatever ``num_workers`` and wherever one starts; a worker's UserError is raised as it is.
    Raises RunError, with the samples that were asked for, when a worker process has ended.
    """
    places = [(step, micro) for step in range(start_step, stop_step) for micro in range(plan.accumulate)]
    source = MicroBatches(datasets, plan, rank)
    batches = iter(
        torch.utils.data.DataLoader(
            source,
            batch_size=None,
            sampler=places,  # type: ignore[arg-type]
            num_workers=num_workers,
            worker_init_fn=_worker,
        )
    )
    if num_workers and threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever the main thread is when a worker dies, in the midst of a collective, too;
        # without it the death is noticed here, within seconds of asking that worker for a batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for step in range(start_step, stop_step):
        yield [_next(batches, source, (step, micro)) for micro in range(plan.accumulate)]


def _next(batches: Iterator[Batch | UserError], source: MicroBatches, place: tuple[int, int]) -> Batch:
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        samples = ", ".join(keys(source.datasets, source.items(place)))
        raise RunError(
            f"a data worker was killed ({error}) before it gave the samples of step {place[0] + 1}: {samples}. Did it "
            "run out of memory? Lower num_workers or look at these samples, then --resume auto"
        ) from error
    if isinstance(batch, UserError):
        raise batch
    return batch


def _worker(number: int) -> None:
    """Start of a worker process; Ctrl-C in a terminal reaches it, too, but only its parent heeds it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()


def keep_memory() -> None:
    """Let this process keep the memory it frees; called at the start of every worker.

    A sample is some 30 MB of arrays. Left alone, glibc returns them to the kernel, which maps and clears the pages anew
    for the next sample: a third of a worker's time (bench/data_path.py). Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        if not mallopt(mmap_threshold, 1 << 30):
            mallopt(mmap_threshold, 32 << 20)  # the most that older versions allow
