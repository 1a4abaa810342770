"""Two processes, one of which is killed, sleeps, or is told to stop: the run ends soon and says which one it was."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrix_runs import Split, start
from small_runs import SAMPLED, a_minute, finished, launch, metrics, pictures, untimed

from xseg.train import manifest, state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SETTINGS = ("steps=4000", "save_every=5", "stall=6")
STARTS = 400.0
"""Seconds that a run may take until it trains."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


def reached(out: Path, step: int, alive: Callable[[], bool]) -> dict[str, Any]:
    """Wait for rank 1's sign of life at ``step``; return it."""
    deadline = time.monotonic() + STARTS
    while True:
        assert alive() and time.monotonic() < deadline, out.with_suffix(".log").read_text()
        if (out / "ranks/1.json").exists():
            found = json.loads((out / "ranks/1.json").read_text())
            if found["step"] >= step:
                return dict(found)
        time.sleep(0.02)


def whole(out: Path) -> None:
    assert not any(p.name.endswith(".tmp") for p in out.rglob("*"))
    assert not any(manifest.fault(path) for path in state.checkpoints(out).values())


def told(out: Path) -> str:
    said = out.with_suffix(".log").read_text()
    lines = [line for line in said.splitlines() if line.startswith("xseg.train:")]
    assert len(lines) == 1, said
    assert (out / "post_mortem.txt").read_text().strip().removeprefix("rank 0: ") in lines[0]
    return lines[0]


@pytest.mark.parametrize("zero", [0, 2], ids=["ddp", "zero2"])
@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "asleep"])
def test_a_rank_is_lost(data: Path, tmp_path: Path, zero: int, harm: signal.Signals) -> None:
    """No launcher looks after the processes here: the one that is left ends by itself."""
    out = tmp_path / "run"
    first, second = start(data, out, Split(zero, 2), *SETTINGS)
    try:
        victim = reached(out, 7, lambda: first.is_alive() and second.is_alive())
        begin = time.monotonic()
        os.kill(victim["pid"], harm)
        first.join(a_minute())
        assert first.exitcode == 1, f"{time.monotonic() - begin:.0f} s\n" + out.with_suffix(".log").read_text()
    finally:
        for process in (first, second):
            process.kill()
            process.join()
    line = told(out)
    culprit = line.split(", while rank 0")[0]
    assert f"rank 1 (process {victim['pid']}" in culprit and " in step " in culprit and "of shapes/" in culprit
    assert "shapes/train/" in culprit
    assert ("that process is gone" if harm == signal.SIGKILL else "no progress for") in culprit
    whole(out)


def test_the_launcher_is_told_to_stop(data: Path, tmp_path: Path) -> None:
    settings = ("steps=30", "save_every=100", *SAMPLED)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    finished(launch("cpu2", data, straight, *settings), straight)
    process = launch("cpu2", data, cut, *settings)
    try:
        reached(cut, 5, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(a_minute()) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "SIGTERM: saving and ending after this step" in cut.with_suffix(".log").read_text()
    whole(cut)
    saved = list(state.checkpoints(cut))
    assert len(saved) == 1 and 4 <= saved[0] < 30
    assert f"step_{saved[0]}" in finished(launch("cpu2", data, cut, *settings, flags=("--resume", "auto")), cut)
    assert untimed(metrics(cut)) == untimed(metrics(straight))
