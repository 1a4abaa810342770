"""A checkpoint becomes one model: it opens, and a run with another split goes on from its weights and its step."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import COMMON, SMALL, TINY, losses, metrics, pictures

from xseg import load
from xseg.models import checkpoint
from xseg.train import state
from xseg.train.__main__ import main as train
from xseg.ui.cli import main as command_line

Run = Callable[..., int]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    root = pictures(tmp_path / "data")
    return [SMALL, f"data_root={root}", "init_from=[]", *COMMON, "loss.points=grid", "save_every=4", "steps=8"]


@pytest.fixture
def run(settings: list[str], tmp_path: Path) -> Iterator[Run]:
    def start(out: str, *given: str, resume: str = "none", stage: str = "s1") -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = str(next(TINY.glob(f"{stage}_*.yaml")))
        return train([path, "--set", *settings, f"out={tmp_path / out}", *given, "--resume", resume])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield start
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def consolidate(settings: list[str], out: Path, to: Path, monkeypatch: pytest.MonkeyPatch, stage: str = "s1") -> int:
    given = [word for setting in (*settings, f"out={out}", "batch_size=4") for word in ("--set", setting)]
    arguments = ["consolidate", str(next(TINY.glob(f"{stage}_*.yaml"))), "--out", str(to), *given]
    monkeypatch.setattr(sys, "argv", ["xseg", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line()
    return int(end.value.code or 0)


def test_on_with_another_split(
    run: Run, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first, whole = tmp_path / "first", tmp_path / "whole"
    assert run("first", "batch_size=4") == 0
    straight = losses(first)
    shutil.rmtree(first / "checkpoints/step_8")
    assert consolidate(settings, first, whole, monkeypatch) == 0
    assert "the weights after step 4" in capsys.readouterr().out
    opened = load(whole)[0].model.state_dict()
    written = checkpoint.read_weights(first / "checkpoints/step_4")
    assert all(torch.equal(value, opened[name]) for name, value in written.items())

    split = ("batch_size=2", "accumulate=2")
    assert run("second", *split, resume=str(whole)) == 0
    assert "goes on after step 4" in capsys.readouterr().out
    rows = metrics(tmp_path / "second")
    assert [row["step"] for row in rows] == [5, 6, 7, 8] and rows[-1]["lr"] == metrics(first)[-1]["lr"]
    assert rows[0]["loss"] == pytest.approx(straight[4], rel=1e-4), "the same weights on the same global batch"
    assert abs(rows[-1]["loss"] / straight[7] - 1) > 1e-4, "the optimiser is new"
    assert list(state.checkpoints(tmp_path / "second")) == [8]
    assert run("second", *split, resume=str(whole)) == 0
    assert "resumed from" in capsys.readouterr().out, "its own checkpoints come first"

    assert run("third", "batch_size=2", resume=str(whole)) == 2
    assert "had 4 samples a step" in capsys.readouterr().err and not (tmp_path / "third/checkpoints").exists()
    assert run("third", *split, "seed=7", resume=str(whole)) == 2
    assert "seed: 1024 -> 7" in capsys.readouterr().err
    assert run("third", *split, resume=str(tmp_path)) == 2
    assert "xseg consolidate" in capsys.readouterr().err
    assert consolidate(settings, first, whole, monkeypatch) == 2
    assert "is there already" in capsys.readouterr().err
    assert consolidate(settings, tmp_path / "nothing", tmp_path / "x", monkeypatch) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_tied_weights_and_words_come_along(
    run: Run, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run("s3", "batch_size=4", "steps=1", stage="s3") == 0
    settings = [*settings, "steps=1"]
    assert consolidate(settings, tmp_path / "s3", tmp_path / "whole", monkeypatch, "s3") == 0
    final, whole = (load(tmp_path / name) for name in ("s3/final", "whole"))
    wanted, found = (model.model.state_dict() for model, _ in (final, whole))
    assert wanted.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert whole[1].encoder is not None
    tampered = checkpoint.read_weights(tmp_path / "s3/final")
    del tampered["background"]
    monkeypatch.setattr("xseg.train.consolidate.weights", lambda path: tampered | {"other": torch.ones(1)})
    assert consolidate(settings, tmp_path / "s3", tmp_path / "half", monkeypatch, "s3") == 2
    said = capsys.readouterr().err
    assert "1 tensors are not there (background), 1 have no place (other)" in said
    assert not (tmp_path / "half").exists()
