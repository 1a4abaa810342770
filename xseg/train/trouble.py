"""What can happen to a run, turned into one message that names the rank, the step and the samples."""

import errno
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from xseg.errors import RunError, UserError
from xseg.train.stop import TOLD, Stopped
from xseg.train.watchdog import Watchdog, behind, listed, place
from xseg.types import Batch

MEMORY = ("out of memory", "DefaultCPUAllocator", "not enough memory")
"""What torch says in an error without a type of its own when an allocation fails."""
LOST = ("gloo", "NCCL", "Connection reset", "Broken pipe")
"""What a collective says when the other side is gone or has called another one."""


@contextmanager
def told(watchdog: Watchdog) -> Iterator[None]:
    """Turn what a user or an administrator can mend into UserError and RunError, told by one rank.

    Anything else is a bug: it passes with its traceback and a note of where the rank stood.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        cause = explained(error, watchdog)
        own = watchdog.claim(f"rank {watchdog.rank}: {cause or f'{type(error).__name__}: {error}'}")
        if cause is None:
            error.add_note(place(watchdog.record))
            raise
        cause.add_note(f"on rank {watchdog.rank}" if own else TOLD)
        if cause is error:
            raise
        raise cause from error


def explained(error: Exception, watchdog: Watchdog) -> UserError | RunError | None:
    """The same error in words that say what to do, or None for one of unknown origin."""
    if isinstance(error, UserError | RunError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or watchdog.folder.parent
        return UserError(f"{where}: disk full ({error.strerror}); free some space, then --resume auto")
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in text for word in MEMORY):
        return UserError(out_of_memory(watchdog, text.splitlines()[0] if text else type(error).__name__))
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in text for word in LOST)):
        with suppress(OSError):
            watchdog.write()
        time.sleep(1)  # the others notice now, too, and write where they stand
        first = text.splitlines()[0]
        return RunError(f"lost the other ranks ({first}); {behind(watchdog.records(), watchdog.rank)}")
    return None


def out_of_memory(watchdog: Watchdog, text: str) -> str:
    """Name the batch that did not fit and what makes one smaller."""
    batch = watchdog.record.get("batch") or {}
    sizes = ", ".join(f"{height}x{width}" for height, width in batch.get("images", []))
    held = (
        f"; the micro-batch holds images (height x width) of {sizes or 'none'}, texts of {batch['tokens']} tokens, "
        f"{batch['queries']} queries, {batch['masks']} masks"
        if batch
        else ""
    )
    return (
        f"out of memory: {place(watchdog.record)}{held} ({text}). Make a micro-batch smaller: halve batch_size and "
        "double accumulate (the losses stay the same), set gradient_checkpointing: true, lower max_tokens of the model "
        "recipe or loss.num_points; or split the states over more processes (train_stages/accelerate/zero3.yaml)"
    )


def check_gradients(watchdog: Watchdog, step: int, batch: Batch) -> None:
    """Raise RunError for trainable parameters that ``batch`` gave no gradient.

    The ranks reduce gradients in one order, and ZeRO-3 applies the last gradient of a parameter again that got none.
    """
    missing = watchdog.missing()
    if missing:
        raise RunError(
            f"step {step + 1}: {len(missing)} trainable parameters got no gradient ({listed(missing)}) from samples "
            f"{listed(batch.keys)}: every micro-batch must touch every trainable part, or the ranks get out of step"
        )


class Skipped:
    """Steps that changed no weight because their loss or gradient was no finite number; counted and bounded."""

    def __init__(self, allowed: int, say: Callable[[str], None]) -> None:
        """``say`` prints a line on rank 0."""
        self.allowed, self.say, self.count = allowed, say, 0

    def check(self, step: int, figures: Mapping[str, float], micros: Sequence[Batch], finite: Sequence[bool]) -> None:
        """Count step ``step`` (0-based) if it was skipped; ``finite``: of the loss of each micro-batch of this rank.

        All ranks call it alike. Raises RunError when it is one more than ``skip_nonfinite`` allows.
        """
        if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
            return
        self.count += 1
        samples = suspects(micros, finite)
        what = f"loss is {figures['loss']:g}, gradient norm {figures['grad_norm']:g}"
        text = f"step {step + 1}: {what}; no weight was changed; samples: {samples}"
        if self.count > self.allowed:
            raise RunError(
                f"{text}. {self.count} such steps, skip_nonfinite allows {self.allowed}: mend these samples (xseg data "
                "lint) or lower the rate; to leave out more steps: --set skip_nonfinite=N --resume auto"
            )
        self.say(f"{text} (skipped, {self.count} of {self.allowed})")


def suspects(micros: Sequence[Batch], finite: Sequence[bool]) -> str:
    """Samples of the micro-batches of all ranks whose loss was not finite; of all, where only gradients were not."""
    mine: list[Any] = [(ok, list(batch.keys)) for batch, ok in zip(micros, finite, strict=True)]
    gathered = gather_object(mine)
    bad = [key for ok, keys in gathered if not ok for key in keys]
    return listed(bad or [key for _, keys in gathered for key in keys])
