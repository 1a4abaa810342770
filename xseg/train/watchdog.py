"""Signs of life: every rank writes what it is at, and a rank that waits too long says where each of them stands.

``out/ranks/R.json`` holds the step and the micro-batch of rank R, with its sample keys and sizes. It outlives the
process, so it also tells what a rank was at that the kernel killed.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from xseg.train.log import rewrite
from xseg.types import Batch

RANKS, REPORT = "ranks", "post_mortem.txt"
SLOW = 20
"""The first step, a checkpoint or a look at held-out images may take so many times the usual patience."""
FACTOR = 10
"""A step that takes so many times the longest one so far is no slow step any more."""
SHOWN = 8
"""Sample keys and parameter names that a message lists."""


class Watchdog:
    """One rank's signs of life, and the thread that notices when they cease.

    Time is counted in ticks of this process: neither a clock that jumps nor a machine that slept looks like a stall.
    """

    def __init__(self, out: Path, rank: int, world: int, patience: float) -> None:
        """``patience``: seconds without a sign of life; longer where steps are (``FACTOR``)."""
        self.folder, self.rank, self.world, self.patience = out / RANKS, rank, world, patience
        self.record: dict[str, Any] = {
            "rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "step": 0, "at": 0, "doing": "starts"
        }  # fmt: skip
        self.arrived: list[str] = []
        """Trainable parameters that got their gradient in this micro-batch, in order."""
        self._names: set[str] = set()
        self._coming: Callable[[], list[str]] = list
        self._scale: float = SLOW
        self._longest = 0.0
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (self.folder.parent / REPORT).unlink(missing_ok=True)
            for left in self.folder.glob("*.json"):
                if left.stem.isdigit() and int(left.stem) >= self.world:
                    left.unlink()
        self.write()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def listen(self, model: torch.nn.Module) -> None:
        """Note every gradient that arrives; called before a framework wraps the model."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._names.add(name)
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda _: self.arrived.append(name)

    def missing(self) -> list[str]:
        """Trainable parameters that got no gradient from the micro-batch that was last ``begin``-ned."""
        return sorted(self._names.difference(self.arrived))

    def step(self, step: int, source: str, coming: Callable[[], list[str]]) -> None:
        """A new optimiser step (1-based) on a data set; ``coming`` names its samples, and is asked only in trouble."""
        self.record |= {"step": step, "source": source, "batch": {}}
        self._coming = coming
        self.at("waits for data")

    def at(self, doing: str) -> None:
        """A sign of life: what this rank does now, in words that follow "rank 0"."""
        self.record |= {"at": self.record["at"] + 1, "doing": doing}

    def begin(self, number: int, held: dict[str, Any]) -> None:
        """A micro-batch begins; its ``contents`` are written down before anything can happen to it."""
        self.arrived.clear()
        self.record["batch"] = held
        self.at(f"computes micro-batch {number + 1}")
        self.write()

    def done(self, seconds: float) -> None:
        """A step is done; the longest one, but for the first, tells how long to wait for the next."""
        if self._scale == 1.0:
            self._longest = max(self._longest, seconds)
        self._scale = 1.0

    @contextmanager
    def slow(self, doing: str) -> Iterator[None]:
        """Something that takes its time: a checkpoint, a look at held-out images."""
        self.at(doing)
        self.write()
        before, self._scale = self._scale, float(SLOW)
        yield
        self._scale = before
        self.at("goes on")

    def write(self) -> None:
        """Put the record where other ranks, and people, find it."""
        with self._lock:
            rewrite(self.folder / f"{self.rank}.json", json.dumps(self.record | {"gradients": len(self.arrived)}))

    def records(self) -> list[dict[str, Any]]:
        """What is known of every rank of this run."""
        paths = (self.folder / f"{rank}.json" for rank in range(self.world))
        return [json.loads(p.read_text(encoding="utf8")) for p in paths if p.is_file()]

    def claim(self, report: str) -> bool:
        """Write ``out/post_mortem.txt``, which only the first rank in trouble may do: it is the one that tells."""
        try:
            with (self.folder.parent / REPORT).open("x", encoding="utf8") as file:
                file.write(report + "\n")
        except FileExistsError:
            return False
        except OSError as error:
            print(f"{self.folder.parent / REPORT}: cannot be written: {error}", file=sys.stderr)
        return True

    def _watch(self) -> None:
        tick = min(1.0, self.patience / 5)
        seen, waited = -1, 0.0
        while not self._over.wait(tick):
            place = self.record["at"] + len(self.arrived)
            waited = 0.0 if place != seen else waited + tick
            seen = place
            limit = self._scale * max(self.patience, FACTOR * self._longest)
            if waited > limit:
                self._give_up(waited)

    def _give_up(self, waited: float) -> None:
        """The main thread waits for something that does not come: tell, and end the process whatever happens."""
        try:
            self.record["batch"] = self.record.get("batch") or {"samples": self._coming()}
            self.write()
            time.sleep(2)  # the others' patience ends now too, and each writes where it stands
            report = f"no progress for {waited:.0f} s (stall); {behind(self.records(), self.rank)}"
            if self.claim(report):
                print(f"xseg.train: {report}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)


def contents(batch: Batch) -> dict[str, Any]:
    """What a micro-batch holds: sample keys, (height, width) of its images, tokens of each text, queries, masks.

    Asked before the batch goes to an accelerator, which would have to be waited for.
    """
    return {
        "samples": list(batch.keys),
        "images": [list(g.original) for g in batch.geometry],
        "tokens": batch.attention_mask.sum(1).tolist(),
        "queries": len(batch.query_image),
        "masks": len(batch.target_query),
    }


def listed(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def place(record: dict[str, Any]) -> str:
    """Where a rank stands: ``rank 1 (pid 12 on host) computes micro-batch 1 of step 3: ...``."""
    batch = record.get("batch") or {}
    of = f" of {record['source']}: {listed(batch['samples'])}" if batch else ""
    gradients = f"; {record['gradients']} gradients had come" if record.get("gradients") else ""
    who = f"rank {record['rank']} (process {record['pid']} on {record['host']})"
    return f"{who} {record['doing']} in step {record['step']}{of}{gradients}"


def behind(records: Sequence[dict[str, Any]], own: int) -> str:
    """Which rank is gone or behind the others, and with what; in one process, where it stands.

    All ranks do the same in the same order, so a rank with fewer signs of life, or with fewer gradients at the same
    place, is the one the others wait for.
    """
    here = next(r["host"] for r in records if r["rank"] == own)
    gone = [r for r in records if r["host"] == here and not alive(r["pid"])]
    if gone:
        return "; ".join(f"{place(r)}; that process is gone" for r in gone)
    order = [(r["at"], r["gradients"]) for r in records]
    last = [r for r, o in zip(records, order, strict=True) if o == min(order)]
    if len(last) == len(records):
        return "all ranks stand at the same place: " + "; ".join(place(r) for r in records)
    rest = next(r for r, o in zip(records, order, strict=True) if o == max(order))
    return f"{'; '.join(place(r) for r in last)}, while {place(rest)}"


def alive(pid: int) -> bool:
    """Whether a process of this machine still runs; one that has ended but that nobody asked about yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="utf8").rsplit(")", 1)[1].split()[0] not in "ZX"
