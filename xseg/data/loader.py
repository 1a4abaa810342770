"""Collated batches of one rank, step by step, prepared by worker processes."""

import ctypes
import sys
from collections.abc import Iterator, Sequence

import torch.utils.data

from xseg.data.collate import collate
from xseg.data.dataset import Dataset
from xseg.data.mixture import Plan
from xseg.errors import UserError
from xseg.types import Batch


class MicroBatches(torch.utils.data.Dataset):
    """The batches of one rank by (step, micro-batch); a UserError is returned, not raised.

    The DataLoader would rewrap an exception of a worker and bury its message under a traceback.
    """

    def __init__(self, datasets: Sequence[Dataset], plan: Plan, rank: int) -> None:
        self.datasets, self.plan, self.rank = datasets, plan, rank

    def __getitem__(self, place: tuple[int, int]) -> Batch | UserError:
        step, micro = place
        items = self.plan.batch(step)[self.rank][micro]
        try:
            return collate([self.datasets[item.dataset].get(item.sample, item.epoch) for item in items])
        except UserError as error:
            return error


def loader(
    datasets: Sequence[Dataset], plan: Plan, rank: int, start_step: int, stop_step: int, num_workers: int = 0
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step from ``start_step`` up to, not including, ``stop_step``.

    The batches are the same whatever ``num_workers`` and wherever one starts; a worker's UserError is raised as it is.
    """
    places = [(step, micro) for step in range(start_step, stop_step) for micro in range(plan.accumulate)]
    batches = iter(
        torch.utils.data.DataLoader(
            MicroBatches(datasets, plan, rank),
            batch_size=None,
            sampler=places,  # type: ignore[arg-type]
            num_workers=num_workers,
            worker_init_fn=keep_memory,
        )
    )
    for _ in range(start_step, stop_step):
        yield [_checked(next(batches)) for _ in range(plan.accumulate)]


def keep_memory(worker: int = 0) -> None:
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


def _checked(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch
