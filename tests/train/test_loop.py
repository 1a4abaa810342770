"""Whole runs of a few steps on a handful of ShapeWorld pictures, in this process."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import COMMON, SAMPLED, SMALL, TINY, losses, metrics, pictures, untimed

from xseg.models import checkpoint
from xseg.train import loop
from xseg.train.__main__ import main

Run = Callable[..., int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``train("s1", out, *settings)`` runs a stage as the command line does and returns its exit status."""

    def run(stage: str, out: Path, *settings: str, flags: Sequence[str] = (), root: Path = data) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = next(TINY.glob(f"{stage}_*.yaml"))
        return main([str(path), "--set", SMALL, f"out={out}", f"data_root={root}", *COMMON, *settings, *flags])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("muon", [0, 4])
def test_a_killed_run_goes_on_as_if_it_never_stopped(
    muon: int, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("steps=6", f"muon={muon}", *SAMPLED)
    assert train("s1", tmp_path / "a", *given) == 0
    whole, step = metrics(tmp_path / "a"), loop.Trainer.step

    def until_five(self: loop.Trainer, number: int, micros: list) -> dict:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, micros)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "step", until_five)
        train("s1", tmp_path / "b", *given)
    assert len(losses(tmp_path / "b")) == 5
    torch.manual_seed(99)
    assert train("s1", tmp_path / "b", *given, flags=["--resume", "auto"]) == 0
    resumed = metrics(tmp_path / "b")
    assert untimed(resumed) == untimed(whole)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    first, second = (checkpoint.read_weights(tmp_path / run / "final") for run in "ab")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_seg_vectors_grow_over_a_stage_through_a_restart(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, step = [], loop.Trainer.step

    def until_three(self: loop.Trainer, number: int, micros: list) -> dict:
        if number == 3 and len(shares) == 3:
            raise KeyboardInterrupt
        shares.append(self.acc.unwrap_model(self.model).seg_share)
        return step(self, number, micros)

    monkeypatch.setattr(loop.Trainer, "step", until_three)
    given = ("steps=4", "save_every=2", "seg_warmup=1", "init_from=[]")
    with pytest.raises(KeyboardInterrupt):
        train("s3", tmp_path, *given)
    assert train("s3", tmp_path, *given, flags=["--resume", "auto"]) == 0
    assert shares == [0.25, 0.5, 0.75, 0.75, 1.0]


def test_a_global_batch_gives_the_same_losses_however_it_is_split(train: Run, tmp_path: Path) -> None:
    fixed = ("steps=4", "loss.points=grid")
    assert train("s1", tmp_path / "a", *fixed, "batch_size=4", "accumulate=1") == 0
    assert train("s1", tmp_path / "b", *fixed, "batch_size=2", "accumulate=2") == 0
    assert train("s1", tmp_path / "c", *fixed, "batch_size=1", "accumulate=4") == 0
    a = losses(tmp_path / "a")
    assert losses(tmp_path / "b") == pytest.approx(a, rel=1e-4)
    assert losses(tmp_path / "c") == pytest.approx(a, rel=1e-4)
    assert len(set(a)) == 4


def test_three_stages_end_in_a_model_that_opens(train: Run, tmp_path: Path) -> None:
    assert train("s1", tmp_path / "s1", "steps=2") == 0
    assert train("s2", tmp_path / "s2", "steps=2", f"init_from=[{tmp_path}/s1/final]") == 0
    both = f"init_from=[{tmp_path}/s1/final, {tmp_path}/s2/final]"
    assert train("s3", tmp_path / "s3", "steps=6", both) == 0
    rows = metrics(tmp_path / "s3")
    assert {row["source"] for row in rows} > {"shapes/panoptic_train"}
    assert all("lm" in row and ("mask" in row) == (row["source"] != "shapes/talk_train") for row in rows)
    s1, s2 = (checkpoint.read_weights(tmp_path / run / "final") for run in ("s1", "s2"))
    sam = [name for name in s2 if name.startswith("segmentor.sam.")]
    assert sam and all(torch.equal(s1[name], s2[name]) for name in sam), "stage 2 freezes SAM"
    reports = json.loads((tmp_path / "s3/final/load_report.json").read_text())
    assert set(sam) <= set(reports[0]["loaded"]) and "siglip_projector.first.weight" in reports[1]["loaded"]
    from xseg import load

    predictor, processor = load(tmp_path / "s3/final")
    assert processor.encoder is not None and predictor.model.config.segmentor_config.head == "concepts"
    given, own = checkpoint.read_weights(tmp_path / "s3/final"), predictor.model.state_dict()
    assert given and all(torch.equal(value, own[name]) for name, value in given.items())


@pytest.fixture
def started(train: Run, tmp_path: Path) -> Path:
    assert train("s1", tmp_path / "run", "steps=2") == 0
    return tmp_path / "run"


def test_a_finished_run_is_left_or_lengthened(train: Run, started: Path) -> None:
    before = metrics(started)
    assert train("s1", started, "steps=2") == 2, "a new run must not overwrite an old one"
    assert train("s1", started, "steps=2", flags=["--resume", "auto"]) == 0
    assert metrics(started) == before
    assert train("s1", started, "steps=3", flags=["--resume", "auto"]) == 0
    assert metrics(started)[:2] == before and len(metrics(started)) == 3


def test_a_changed_recipe_is_not_resumed(train: Run, started: Path, capsys: pytest.CaptureFixture) -> None:
    slower = "trainable=[{match: .*, lr: 1.0e-5}]"
    assert train("s1", started, "steps=4", slower, flags=["--resume", "auto"]) == 2
    message = capsys.readouterr().err
    assert "recipe changed" in message and "1e-05" in message and "trainable" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainable=[{match: segmentor.sam., lr: 1}, {match: segmentr, lr: 1}]"], "'segmentr' matches no parameter"),
        (["head=concepts"], "asks for a fixed label list; set head: labels"),
        (["parts=[segmentor, siglip, llm]", "mixture=shapes_s3"], "asks by text; set head: concepts"),
        (["data_root=nowhere"], "nowhere/shapes/train/panoptic.json"),
    ],
)
def test_wrong_input_is_told_before_training(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture, settings: list[str], words: str
) -> None:
    assert train("s1", tmp_path / "run", *settings) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_told_by_its_key(
    train: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    victim = sorted((copy / "shapes/train/images").iterdir())[5]
    victim.unlink()
    assert train("s1", tmp_path / "run", "steps=6", root=copy) == 2
    message = capsys.readouterr().err
    assert victim.name in message and "shapes/train/" in message and "Traceback" not in message


def test_a_loss_that_is_not_a_number_stops_the_run(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call = loop.Criterion.__call__

    def broken(self: loop.Criterion, *args: object, **options: object) -> object:
        given = call(self, *args, **options)
        return dataclasses.replace(given, total=given.total * float("nan"))

    monkeypatch.setattr(loop.Criterion, "__call__", broken)
    assert train("s1", tmp_path / "run", "steps=2") == 1
    assert "step 1: loss is nan" in capsys.readouterr().err


def test_batches_by_length_do_not_depend_on_how_they_are_split(train: Run, tmp_path: Path) -> None:
    mixture = "mixture={datasets: [shapes/refer_train, shapes/talk_train], balance: null, by_length: 2}"
    given = ("steps=4", "init_from=[]", "loss.points=grid", mixture)
    assert train("s3", tmp_path / "whole", "batch_size=4", *given) == 0
    assert train("s3", tmp_path / "parts", "batch_size=2", "accumulate=2", *given) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_stage_without_text_cannot_sort_by_length(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = "{recipe: shapes/panoptic_train, task: {name: generic_seg, labels: fixed}}"
    assert train("s1", tmp_path / "a", f"mixture={{datasets: [{entry}], balance: null, by_length: 2}}") == 2
    assert "by_length: 2: a stage without a language model reads no text" in capsys.readouterr().err
    assert not (tmp_path / "a/metrics.jsonl").exists()
