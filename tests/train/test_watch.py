"""A stage that looks at held-out images trains as if it did not, and its figures are those of the evaluation."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import COMMON, SAMPLED, SMALL, TINY, metrics, pictures, untimed

from xseg import load
from xseg.config import Suite, SuiteRow
from xseg.data.shapeworld.write import write
from xseg.errors import UserError
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.models import checkpoint
from xseg.train import loop, stage, watch
from xseg.train.__main__ import main

Run = Callable[..., int]
WATCH = ("watch.suite=shapes", "watch.every=2", "watch.images=3")
PANOPTIC, REFER, TALK = (f"shapes/{kind}_val" for kind in ("panoptic", "refer", "talk"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = pictures(tmp_path_factory.mktemp("data"))
    write(root / "shapes/val", 6, seed=3, size=48, split="val")
    return root


@pytest.fixture
def train(data: Path) -> Iterator[Run]:
    def run(name: str, out: Path, *settings: str, flags: Sequence[str] = ()) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        path = next(TINY.glob(f"{name}_*.yaml"))
        return main([str(path), "--set", SMALL, f"out={out}", f"data_root={data}", *COMMON, *settings, *flags])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def steps(out: Path) -> list[dict]:
    """The lines without what looks added to them."""
    return [{k: v for k, v in row.items() if k != "held_out"} for row in untimed(metrics(out))]


def looks(out: Path) -> dict[int, dict]:
    """Held-out figures by step."""
    return {row["step"]: row["held_out"] for row in metrics(out) if "held_out" in row}


def same_weights(a: Path, b: Path) -> bool:
    first, second = (checkpoint.read_weights(run / "final") for run in (a, b))
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("name", "rows"), [("s1", {PANOPTIC}), ("s2", {TALK}), ("s3", {PANOPTIC, REFER, TALK})])
def test_a_watched_run_trains_as_an_unwatched_one(train: Run, tmp_path: Path, name: str, rows: set[str]) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert train(name, plain, "steps=5", "init_from=[]", *SAMPLED) == 0
    assert train(name, watched, "steps=5", "init_from=[]", *SAMPLED, *WATCH) == 0
    assert steps(watched) == steps(plain) and len(steps(plain)) == 5
    assert same_weights(plain, watched)
    assert list(looks(watched)) == [2, 4, 5] and all(set(found) == rows for found in looks(watched).values())
    assert not looks(plain)


def test_the_last_look_is_the_evaluation_of_the_exported_model(
    train: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", []

    def spy(predictor: Any, *rest: Any) -> dict[str, Any]:
        assert not any(module.training for module in predictor.model.modules())
        seen.append({name: value.clone() for name, value in predictor.model.state_dict().items()})
        return evaluate(predictor, *rest)

    monkeypatch.setattr(watch, "evaluate", spy)
    assert train("s3", run, "steps=3", "init_from=[]", *WATCH) == 0
    exported = checkpoint.read_weights(run / "final")
    changed, last = ([n for n, v in exported.items() if not torch.equal(v, weights[n])] for weights in seen)
    assert changed and not last
    predictor, _ = load(run / "final")
    figures = looks(run)[3]
    limits = {PANOPTIC: 3, REFER: figures[REFER]["n"], TALK: figures[TALK]["n"]}
    assert limits[REFER] > 3 and limits[TALK] > 3, "three images have several sentences each"
    suite = Suite(name="same", rows=[SuiteRow(recipe=name, limit=n) for name, n in limits.items()])
    found = evaluate(predictor, suite, Evaluation(data, tmp_path / "eval"))["rows"]
    for name, figure in figures.items():
        row = next(r for r in found if r["dataset"] == name)
        assert figure == {key: row[key] for key in ("metric", "value", "n")}


def test_every_image_counts_once_however_many_sentences_it_has(train: Run, data: Path) -> None:
    from xseg.train import assemble

    small = stage.read_stage(str(next(TINY.glob("s3_*"))), [SMALL, f"data_root={data}", "init_from=[]", *WATCH])
    loaded = assemble.load_data(small)
    skeleton = assemble.skeleton(assemble.configuration(small, loaded))
    held_out = watch.held_out(small, skeleton, loaded.processor, "")
    assert held_out is not None
    for row in held_out.suite.rows:
        dataset = watch.open_row(watch.Predictor(skeleton, loaded.processor), row, data)
        assert dataset is not None and len({dataset.sample(i).image_id for i in range(len(dataset))}) == 3
    for split_by in ("ZeRO-3", "FSDP2"):
        with pytest.raises(UserError, match=rf"under {split_by} no rank has whole weights .*zero2\.yaml"):
            watch.held_out(small, skeleton, loaded.processor, split_by)


def test_a_killed_run_has_every_look_once(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("steps=6", "save_every=2", *WATCH)
    assert train("s1", tmp_path / "whole", *settings) == 0
    figures = watch.HeldOut.figures

    def cut(self: watch.HeldOut, model: torch.nn.Module) -> dict:
        if cut_at.pop(0):
            raise KeyboardInterrupt
        return figures(self, model)

    run, flags = tmp_path / "cut", ()
    for cut_at in ([False, True], [True], [False, False]):
        with monkeypatch.context() as patch:
            patch.setattr(loop.HeldOut, "figures", cut)
            if any(cut_at):
                with pytest.raises(KeyboardInterrupt):
                    train("s1", run, *settings, flags=flags)
            else:
                assert train("s1", run, *settings, flags=flags) == 0
        flags = ("--resume", "auto")
    assert untimed(metrics(run)) == untimed(metrics(tmp_path / "whole"))
    seconds = [row["elapsed_s"] for row in metrics(run)]
    assert seconds == sorted(seconds)


def test_looks_are_written_whatever_log_every_says(train: Run, tmp_path: Path) -> None:
    assert train("s1", tmp_path / "run", "steps=5", "log_every=3", *WATCH) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [2, 3, 4, 5]
    assert all("loss" in row and "lr" in row for row in metrics(tmp_path / "run"))


def test_looks_take_no_training_time(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(loop.HeldOut, "figures", lambda *_: time.sleep(60) or {})
    now = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + now[0])
    assert train("s1", tmp_path / "run", "steps=4", *WATCH) == 0
    assert now[0] >= 120 and metrics(tmp_path / "run")[-1]["elapsed_s"] < 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["watch.suite=shape", "watch.every=2"], "did you mean 'shapes'"),
        (["watch.suite=shapes", "watch.every=0"], "watch.every = 0"),
        (["watch.suite=shapes", "watch.image=3"], "did you mean 'images'"),
        (["watch.suite=TALK"], "no row fits"),
        (["watch.suite=overfit"], "shapes/overfit/panoptic.json"),
    ],
)
def test_a_wrong_watch_is_told_before_training(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture, settings: list[str], words: str
) -> None:
    talk = tmp_path / "talk.yaml"
    talk.write_text(f"name: talk\nrows: [{TALK}]\n", encoding="utf8")
    given = [text.replace("TALK", str(talk)) for text in settings]
    assert train("s1", tmp_path / "run", *given) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
