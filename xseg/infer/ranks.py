"""The processes of an evaluation: each scores a stretch of every data set, and rank 0 puts the stretches together.

Every process has the whole model, so nothing but results goes between them: objects over gloo, on any machine.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from xseg.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: stretches take unequal time, and rank 0 scores the blind baselines alone."""


@dataclass(frozen=True)
class Ranks:
    """This process among all those of an evaluation; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """Where this process's model goes; None = wherever a process that is alone puts it."""
        if self.world == 1:
            return None
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"

    def stretch(self, count: int) -> range:
        """The numbers out of ``count`` that are this process's; those of all, by rank, are 0, 1, … in order."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def agreed(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every process and return what it gave here; a UserError of any is raised on all of them."""
        if self.world == 1:
            return work()
        found: list[T] = []
        trouble: UserError | None = None
        try:
            found.append(work())
        except UserError as error:
            trouble = error
        everywhere: list[UserError | None] = [None] * self.world
        dist.all_gather_object(everywhere, trouble)
        for told in everywhere:
            if told is not None:
                raise told
        return found[0]

    def gathered(self, value: T) -> list[T] | None:
        """Return the values of all processes, by rank, on rank 0 and None on the others."""
        if self.world == 1:
            return [value]
        values = [value] * self.world if self.first else None
        dist.gather_object(value, values, dst=0)
        return values

    def tell(self, value: T) -> T:
        """Return rank 0's ``value`` on every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun or ``accelerate launch`` started; alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()
