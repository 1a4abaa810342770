"""What is shipped under examples/: found from anywhere, small, and able to answer."""

from pathlib import Path

import pytest

from xseg.errors import UserError
from xseg.infer.card import EXAMPLE, FILE, PHRASE
from xseg.paths import DEFAULT_MODEL, find, shipped

ROOT = Path(__file__).parent.parent
MODEL = ROOT / DEFAULT_MODEL
MOST_BYTES = 12_000_000
trained = pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="no weights yet: make train-long")


def test_examples_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{DEFAULT_MODEL}/{EXAMPLE}"
    assert find(name, "train_stages/models", suffix="") == shipped(name) == ROOT / name
    (tmp_path / DEFAULT_MODEL).mkdir(parents=True)
    (tmp_path / name).write_bytes(b"mine")
    assert find(name, "train_stages/models", suffix="").resolve() == tmp_path / name, "what lies nearer wins"


@pytest.mark.parametrize("name", ["tests", "pyproject.toml", "xseg", "examples/none"])
def test_nothing_else_of_the_package_is_a_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped(name) is None
    with pytest.raises(UserError, match="no such file"):
        find(name, "train_stages/models", suffix="")


def test_a_lost_part_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make parts") as lost:
        find("examples/tiny_parts/none", "train_stages/models", suffix="")
    assert str(tmp_path) in str(lost.value) and str(ROOT) in str(lost.value)


@trained
def test_the_shipped_model_is_small_and_has_its_card() -> None:
    files = [p for p in MODEL.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= MOST_BYTES
    card = (MODEL / FILE).read_text(encoding="utf8")
    for heading in ("## Held-out figures", "Blind baselines:", "## What it cannot do", "Weights: Apache-2.0"):
        assert heading in card, heading


@trained
def test_the_shipped_model_answers_on_the_shipped_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from xseg import load
    from xseg.infer.session import Session

    monkeypatch.chdir(tmp_path)
    predictor, _ = load(device="cpu")
    assert {p.dtype for p in predictor.model.parameters()} == {torch.float32}
    assert predictor.segment(f"{DEFAULT_MODEL}/{EXAMPLE}", PHRASE).found
    session = Session(predictor)
    session.set_image(f"{DEFAULT_MODEL}/{EXAMPLE}")
    answer = session.ask(PHRASE)
    assert len(answer.segments) == 1 and answer.coverage[0] > 0
