"""Faults planted in a run of one process: each ends as documented, with the sample named and nothing half-written."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import COMMON, SAMPLED, SMALL, TINY, a_minute, losses, metrics, pictures, untimed

from xseg.data.dataset import Dataset
from xseg.models import checkpoint
from xseg.train import loop, manifest, state
from xseg.train.__main__ import main
from xseg.types import Encoded

Run = Callable[..., int]
GO_ON = ("--resume", "auto")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Path:
    """A copy of the data to do harm to."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def train(data: Path) -> Iterator[Run]:
    def run(stage: str, out: Path, *settings: str, flags: Sequence[str] = (), root: Path = data) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = next(TINY.glob(f"{stage}_*.yaml"))
        given = [SMALL, f"out={out}", f"data_root={root}", *COMMON, *SAMPLED, "init_from=[]", *settings]
        begin = time.monotonic()
        status = main([str(path), "--set", *given, *flags])
        assert time.monotonic() - begin < a_minute()
        whole(out)
        return status

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def whole(out: Path) -> None:
    """Nothing half-written: metrics are lines of JSON, checkpoints are as their manifests say."""
    for path in out.rglob("*"):
        assert not path.name.endswith((".tmp", ".old", ".partial")), path
    for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []:
        json.loads(line)
    for path in state.checkpoints(out).values():
        assert not manifest.fault(path)


def test_a_corrupt_image(train: Run, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    victim = sorted((own / "shapes/train/images").iterdir())[5]
    os.truncate(victim, 200)
    assert train("s1", tmp_path / "run", "steps=6", root=own) == 2
    said = capsys.readouterr().err
    assert victim.name in said and "shapes/train/" in said and "cannot be decoded" in said
    assert "shapes/train/" in (tmp_path / "run/post_mortem.txt").read_text()


def test_an_annotation_without_its_mask(train: Run, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No field: refused by its id. A mask without a pixel: the object is left out, and the run goes on."""
    file = own / "shapes/train/instances.json"
    content = json.loads(file.read_text())
    victim = content["annotations"][0]
    segmentation = victim.pop("segmentation")
    file.write_text(json.dumps(content))
    assert train("s3", tmp_path / "a", "steps=6", root=own) == 2
    assert f"annotation {victim['id']}" in capsys.readouterr().err and not (tmp_path / "a").exists()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [] if segmentation else segmentation
    file.write_text(json.dumps(content))
    assert train("s3", tmp_path / "b", "steps=6", root=own) == 0
    assert len(losses(tmp_path / "b")) == 6


@pytest.fixture
def nan_pixels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The given samples of the first data set have pixels that are no numbers."""

    def plant(*indices: int) -> None:
        get = Dataset.get

        def broken(self: Dataset, index: int, epoch: int = 0) -> Encoded:
            encoded = get(self, index, epoch)
            if index not in indices:
                return encoded
            images = [dataclasses.replace(i, mask=np.full_like(i.mask, np.nan)) for i in encoded.images]
            return dataclasses.replace(encoded, images=tuple(images))

        monkeypatch.setattr(Dataset, "get", broken)

    return plant


def test_pixels_that_are_no_numbers(
    train: Run, tmp_path: Path, nan_pixels: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    nan_pixels(3, 8)
    assert train("s1", tmp_path / "run", "steps=6", "save_every=1") == 1
    said = capsys.readouterr().err
    assert "loss is nan" in said and "skip_nonfinite allows 0" in said
    first = len(losses(tmp_path / "run"))
    # Each epoch of six steps meets both; one may be left out, the second ends the run again.
    assert train("s1", tmp_path / "run", "steps=6", "save_every=1", "skip_nonfinite=1", flags=GO_ON) == 1
    assert "2 such steps, skip_nonfinite allows 1" in capsys.readouterr().err
    assert train("s1", tmp_path / "run", "steps=6", "save_every=1", "skip_nonfinite=2", flags=GO_ON) == 0
    rows = metrics(tmp_path / "run")
    bad = [row for row in rows if row["loss"] is None]
    assert len(rows) == 6 and [row["skipped"] for row in bad] == [1, 2] and bad[0]["step"] == first + 1
    assert all(row["grad_norm"] is None for row in bad)
    weights = checkpoint.read_weights(tmp_path / "run/final")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_skipped_step_changes_no_weight(
    train: Run, tmp_path: Path, nan_pixels: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    nan_pixels(*range(12))
    assert train("s1", tmp_path / "run", "steps=3", "save_every=1", "keep_checkpoints=3", "skip_nonfinite=3") == 0
    said = capsys.readouterr().out
    assert "step 2: loss is nan" in said and "(skipped, 2 of 3)" in said
    first, last = (checkpoint.read_weights(tmp_path / f"run/checkpoints/step_{step}") for step in (1, 3))
    assert all(torch.equal(value, last[name]) for name, value in first.items())


def test_a_data_worker_is_killed(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step, killed = loop.Trainer.step, []

    def kill(self: loop.Trainer, number: int, micros: list) -> dict:
        if number == 1:
            worker = multiprocessing.active_children()[0]
            killed.append(worker.pid)
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()
        return step(self, number, micros)

    monkeypatch.setattr(loop.Trainer, "step", kill)
    assert train("s1", tmp_path / "run", "steps=40", "num_workers=1") == 1
    said = capsys.readouterr().err
    assert f"(pid(s) {killed[0]}) exited unexpectedly" in said and "shapes/train/" in said and "--resume auto" in said
    assert 2 <= len(losses(tmp_path / "run")) < 40
    monkeypatch.setattr(loop.Trainer, "step", step)
    assert train("s1", tmp_path / "run", "steps=6", "num_workers=1", flags=GO_ON) == 0
    assert train("s1", tmp_path / "alone", "steps=6") == 0
    assert losses(tmp_path / "run")[:2] == losses(tmp_path / "alone")[:2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, workers: int
) -> None:
    """The signal goes to all processes, as from a terminal or a scheduler."""
    step = loop.Trainer.step

    def signalled(self: loop.Trainer, at: int, micros: list) -> dict:
        if at == 2:
            for pid in (os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())):
                os.kill(pid, number)
            time.sleep(0.2)
        return step(self, at, micros)

    settings = ("steps=8", "save_every=100", f"num_workers={workers}")
    assert train("s1", tmp_path / "whole", *settings) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", signalled)
        assert train("s1", tmp_path / "run", *settings) == 128 + number
    assert list(state.checkpoints(tmp_path / "run")) == [3] and not (tmp_path / "run/final").exists()
    assert train("s1", tmp_path / "run", *settings, flags=GO_ON) == 0
    assert untimed(metrics(tmp_path / "run")) == untimed(metrics(tmp_path / "whole"))


@pytest.mark.parametrize("limit", [300, 20_000])
def test_a_full_disk(train: Run, tmp_path: Path, capsys: pytest.CaptureFixture, limit: int) -> None:
    """Files beyond ``limit`` bytes fail, as all do on a full disk: metrics.jsonl (300 bytes), then a checkpoint."""
    constant = ("save_every=2", "schedule.kind=constant")
    assert train("s1", tmp_path / "run", "steps=2", *constant) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert train("s1", tmp_path / "run", "steps=4", *constant, flags=GO_ON) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "ree some space" in said and "--resume auto" in said and "Traceback" not in said
    assert list(state.checkpoints(tmp_path / "run")) == [2]
    assert train("s1", tmp_path / "run", "steps=4", *constant, flags=GO_ON) == 0
    assert train("s1", tmp_path / "other", "steps=4", *constant) == 0
    assert losses(tmp_path / "run")[2:] == losses(tmp_path / "other")[2:]


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_the_clock_jumps(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    step, now, shift = loop.Trainer.step, time.time, []

    def jumping(self: loop.Trainer, number: int, micros: list) -> dict:
        if number == 1:
            shift.append(jump)
        return step(self, number, micros)

    monkeypatch.setattr(loop.Trainer, "step", jumping)
    monkeypatch.setattr(time, "time", lambda: now() + sum(shift))
    assert train("s1", tmp_path / "run", "steps=4", "stall=5") == 0
    seconds = [row["elapsed_s"] for row in metrics(tmp_path / "run")]
    assert seconds == sorted(seconds) and seconds[-1] < a_minute()


def test_memory_that_does_not_do(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call = loop.Criterion.__call__

    def greedy(self: loop.Criterion, *args: object, **options: object) -> object:
        torch.empty(2**50)
        return call(self, *args, **options)

    monkeypatch.setattr(loop.Criterion, "__call__", greedy)
    assert train("s3", tmp_path / "run", "steps=2") == 2
    said = capsys.readouterr().err
    for word in ("out of memory", "rank 0", "step 1 of shapes/", "48x48", "tokens", "batch_size", "Make a micro-batch"):
        assert word in said
