"""Stage 3 on a chosen split over processes and micro-batches, each process a fork of a server that has imported all."""

import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from small_runs import COMMON, SMALL, TINY

from xseg.data.dataset import Dataset
from xseg.data.mixture import Item, Plan
from xseg.types import Encoded

GLOBAL = 8
"""Samples of a global batch, in all cases."""
FSDP2 = -1
"""In the place of a ZeRO stage."""
Mix = Literal["same", "divergent", "mixed", "parted"]
"""A global batch of one data set; of another one on every rank; of all of them side by side. "parted": masks in the
first step, conversation alone from then on."""
SMOOTH = ("loss.points=grid", "clip=1.0", "loss.match_class=null", "seed=7")
"""Matched by the class almost alone, queries that know nothing yet are as good as each other: rounding picks one.
Matched by masks too they seldom are: with seed 1024 once, in step 16 of the mixed run, with eight other seeds never."""
ENVIRONMENT = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
}
"""What `accelerate launch` sets for a DeepSpeed file of train_stages/accelerate, but for the ZeRO stage."""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "no"}
"""Likewise for fsdp2.yaml."""


@dataclass(frozen=True)
class Split:
    """How a global batch lies on processes and micro-batches."""

    zero: int = 0
    """ZeRO stage; 0 = DDP, or nothing with one process; -1 = FSDP2."""
    world: int = 1
    accumulate: int = 1

    @property
    def size(self) -> int:
        """Samples of a micro-batch."""
        return GLOBAL // (self.world * self.accumulate)


class Arranged(Plan):
    """The mixes, laid out for one split and dealt to another (the single process that others are compared with)."""

    def __init__(self, plan: Plan, mix: Mix, laid: Split) -> None:
        super().__init__(plan.lengths, [1.0] * len(plan.lengths), plan.batch_size, plan.world, plan.accumulate)
        self.mix, self.laid = mix, laid

    def batch(self, step: int) -> list[list[list[Item]]]:
        """As ``Plan.batch``."""
        kinds, items = len(self.lengths), []
        for place in range(GLOBAL):
            rank = place // self.laid.size % self.laid.world
            kind = {"same": step, "divergent": step + rank, "mixed": step + place, "parted": 2 * min(step, 1)}[self.mix]
            kind %= kinds
            items.append(Item(kind, (step * GLOBAL + place) % self.lengths[kind], 0))
        size = self.batch_size
        return [
            [items[start : start + size] for start in range(rank * size, GLOBAL, self.world * size)]
            for rank in range(self.world)
        ]


def start(
    data: Path, out: Path, split: Split, *settings: str, arranged: tuple[Mix, Split] | None = None, poisoned: str = ""
) -> list[Any]:
    """The processes of a run on ``split``; ``arranged``: its mix, laid out for a split, and SGD in place of AdamW.

    The pictures of the source called ``poisoned`` hold no numbers.
    """
    forks: Any = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["xseg.train.loop", "deepspeed", "matrix_runs"])
    path = str(next(TINY.glob("s3_*.yaml")))
    given = [SMALL, f"out={out}", f"data_root={data}", "init_from=[]", *COMMON, *SMOOTH]
    given += [f"batch_size={split.size}", f"accumulate={split.accumulate}", *settings]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    processes = [
        forks.Process(target=child, args=([path, "--set", *given], out, split, (rank, port), arranged, poisoned))
        for rank in range(split.world)
    ]
    for process in processes:
        process.start()
    return processes


def train(data: Path, out: Path, split: Split, mix: Mix, laid: Split, *settings: str, poisoned: str = "") -> None:
    """Train on ``split``, batches arranged for ``laid``; all processes must end well."""
    processes = start(data, out, split, *settings, arranged=(mix, laid), poisoned=poisoned)
    for process in processes:
        process.join(500)
        if process.exitcode is None:
            process.kill()
    assert [p.exitcode for p in processes] == [0] * split.world, out.with_suffix(".log").read_text()


def child(
    arguments: list[str],
    out: Path,
    split: Split,
    place: tuple[int, int],
    arranged: tuple[Mix, Split] | None,
    poisoned: str,
) -> None:
    """One process of a run, as the launcher would start it; ``place``: its rank and the port they meet at."""
    rank, port = place
    with out.with_suffix(".log").open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    if split.zero == FSDP2:
        os.environ.update(FSDP)
    elif split.zero:
        os.environ.update(ENVIRONMENT, ACCELERATE_DEEPSPEED_ZERO_STAGE=str(split.zero))
    if split.zero or split.world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": split.world, "LOCAL_WORLD_SIZE": split.world}
        os.environ.update({k: str(v) for k, v in (ranks | {"MASTER_PORT": port}).items()}, MASTER_ADDR="127.0.0.1")
    from xseg.train import assemble, optim
    from xseg.train.__main__ import main

    if arranged is not None:
        plan = assemble.plan
        assemble.plan = lambda *given: Arranged(plan(*given), *arranged)
        optim.build = sgd  # type: ignore[assignment]
    if poisoned:
        poison(poisoned)
    status = main(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def sgd(model: torch.nn.Module, selections: Any, recipe: Any) -> torch.optim.Optimizer:
    """An optimiser in which a weight without a gradient stays where it is, and rounding does not grow."""
    parameters = dict(model.named_parameters())
    return torch.optim.SGD([{"params": [parameters[n] for n in s.names], "lr": s.group.lr} for s in selections])


def poison(source: str) -> None:
    """Make the pixels of a source's pictures no numbers."""
    get = Dataset.get

    def broken(self: Dataset, index: int, epoch: int = 0) -> Encoded:
        encoded = get(self, index, epoch)
        if not type(self.source).__module__.endswith(f".{source}"):
            return encoded
        images = [replace(image, mask=np.full_like(image.mask, np.nan)) for image in encoded.images]
        return replace(encoded, images=tuple(images))

    Dataset.get = broken  # type: ignore[method-assign]
