"""kill -9, twenty times in a row at random moments of the three stages, and at every moment of a checkpoint.

Each run is a fork of a server that has imported everything, so a start takes about a second.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import COMMON, SAMPLED, SMALL, TINY, metrics, pictures, untimed

from xseg.models import checkpoint
from xseg.train import state

STEPS = 60
KILLS = {"s1": 7, "s2": 7, "s3": 6}
PATIENCE = 200.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def context() -> Any:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["xseg.train.loop", "small_runs"])
    return forks


def start(context: Any, data: Path, stage: str, out: Path, point: str = "", steps: int = STEPS) -> Any:
    """A process that trains, or goes on; at ``point`` of its second checkpoint it kills itself."""
    arguments = [str(next(TINY.glob(f"{stage}_*.yaml"))), "--resume", "auto", "--set", SMALL, f"out={out}"]
    settings = [f"data_root={data}", "init_from=[]", *COMMON, *SAMPLED, f"steps={steps}", "save_every=4"]
    process = context.Process(target=child, args=([*arguments, *settings], out.with_suffix(".log"), point))
    process.start()
    return process


def child(arguments: list[str], log: Path, point: str) -> None:
    """What a process does; ``xseg.train.__main__`` is imported here, as it is no module to preload."""
    from xseg.train.__main__ import main

    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    if point:
        PLANTS[point]()
    status = main(arguments)
    os._exit(status)


def finished(process: Any, out: Path) -> None:
    process.join(PATIENCE)
    assert process.exitcode == 0, out.with_suffix(".log").read_text()


def killed(process: Any, out: Path) -> None:
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL, out.with_suffix(".log").read_text()


def steps_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def resumes(out: Path) -> int:
    """How often a run has said that it goes on."""
    log = out.with_suffix(".log")
    return log.read_text().count("resumed from") if log.exists() else 0


def same_run(a: Path, b: Path) -> None:
    """Every figure of every step, digit by digit, and the weights, bit by bit."""
    assert untimed(metrics(a)) == untimed(metrics(b)) and len(metrics(a)) > 5
    first, second = (checkpoint.read_weights(run / "final") for run in (a, b))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not [p for p in a.rglob("*") if p.name.endswith((".tmp", ".old", ".damaged"))]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", KILLS)
def test_kill_nine_at_random_moments(context: Any, data: Path, tmp_path: Path, stage: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(start(context, data, stage, whole), whole)
    rng = np.random.default_rng([1024, *stage.encode()])
    # A fast machine does many steps between the look at a target and the kill: the end is far from the last one.
    targets = sorted(rng.choice(np.arange(1, STEPS // 2), KILLS[stage], replace=False).tolist())
    resumed = 0
    for target in targets:
        process = start(context, data, stage, cut)
        deadline = time.monotonic() + PATIENCE
        while steps_done(cut) < target or resumes(cut) < resumed:
            assert process.is_alive() and time.monotonic() < deadline, cut.with_suffix(".log").read_text()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        killed(process, cut)
        resumed += bool(state.checkpoints(cut))
    finished(start(context, data, stage, cut), cut)
    assert resumes(cut) == resumed > 3
    same_run(cut, whole)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, act: Callable[..., Any]) -> None:
    """The ``number``-th call of a function does ``act`` instead."""
    function, calls = getattr(owner, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return (act if len(calls) == number else function)(*args, **options)

    setattr(owner, name, counted)


def half_a_file(thing: Any, path: Any, **_: Any) -> None:
    Path(path).write_bytes(b"half of it")
    die()


def half_a_folder(folder: Path, **_: Any) -> None:
    next(p for p in folder.rglob("*") if p.is_file()).unlink()
    die()


def only_the_drop() -> None:
    """rmtree removes leftovers, too, and what is not there; here only an old checkpoint counts."""
    rmtree = shutil.rmtree

    def removed(folder: Path, **options: Any) -> None:
        dropped = folder.name == ".step_4.old" and folder.exists()
        (half_a_folder if dropped else rmtree)(folder, **options)

    shutil.rmtree = removed  # type: ignore[assignment]


# A checkpoint of one process: two torch.save, a manifest, five files and folders flushed, one or two renames.
PLANTS: dict[str, Callable[[], None]] = {
    "in a file": lambda: at_call(torch, "save", 4, half_a_file),
    "before the manifest": lambda: at_call(state.manifest, "write", 2, die),
    "before it is on the disk": lambda: at_call(state, "_flush", 8, die),
    "before its name": lambda: at_call(Path, "rename", 2, die),
    "before old ones go": lambda: at_call(state, "_drop", 1, die),
    "while an old one goes": only_the_drop,
}


@pytest.fixture(scope="module")
def straight(context: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finished(start(context, data, "s1", out, steps=14), out)
    return out


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("point", PLANTS)
def test_kill_nine_while_a_checkpoint_is_written(
    context: Any, data: Path, straight: Path, tmp_path: Path, point: str
) -> None:
    cut = tmp_path / "cut"
    killed(start(context, data, "s1", cut, point, steps=14), cut)
    assert not (cut / "final").exists()
    finished(start(context, data, "s1", cut, steps=14), cut)
    assert "resumed from" in cut.with_suffix(".log").read_text()
    same_run(cut, straight)
