"""Where exports and imports may write: nothing of a user's is replaced, and an earlier export is replaced whole."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import save_model

from xseg.errors import UserError
from xseg.infer import card
from xseg.infer import export as module
from xseg.infer.export import EXPORT, Export, export
from xseg.infer.language import export_language
from xseg.infer.predictor import load
from xseg.models import adapters, checkpoint
from xseg.paths import default_model
from xseg.ui.cli import main


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("run") / "s3/final", ("segmentor", "siglip", "llm"), "concepts")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PICTURES", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("write", [export, export_language])
def test_a_folder_with_files_of_ones_own_is_refused_untouched(
    final: Path, tmp_path: Path, write: Callable[[Export], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{write.__module__}.load", lambda *a, **k: pytest.fail("the place is looked at first"))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("my_other.safetensors", "README.md", "config.json"):
        (out / name).write_text("mine")
    before = contents(out)
    with pytest.raises(UserError, match=r"is there already.*choose another folder"):
        write(Export(final, out))
    assert contents(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_training_wrote_is_no_earlier_export(final: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "s3/final", ("segmentor", "siglip", "llm"), "concepts")
    before = contents(other)
    with pytest.raises(UserError, match=r"without a README\.md that holds 'Written by `xseg export`'"):
        export(Export(final, other))
    assert contents(other) == before


def test_an_earlier_export_is_replaced_and_opens(final: Path, tmp_path: Path) -> None:
    """As `make train-long` does it: the example picture stays, and nothing of the old model does."""
    out = tmp_path / "out"
    export(Export(final, out, "fp32"))
    (out / card.EXAMPLE).write_bytes(b"picture")
    (out / adapters.FILE).write_text("{}")
    (out / adapters.WEIGHTS).write_bytes(b"old")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    export(Export(final, out, "fp32"))
    assert (out / card.EXAMPLE).read_bytes() == b"picture"
    assert [p.name for p in out.glob("*adapter*")] + [p.name for p in out.glob("model-*")] == []
    load(out, "cpu")


def test_the_shipped_model_may_be_made_anew() -> None:
    checkpoint.check_place(default_model(), EXPORT)


@pytest.mark.parametrize("place", [".", "..", "FILE", "FILE/below", "/proc/x"])
@pytest.mark.parametrize("language", [(), ("--language",)])
def test_a_place_that_cannot_be_replaced_is_one_message(
    final: Path,
    tmp_path: Path,
    place: str,
    language: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/FILE").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["xseg", "export", str(final), "--out", place, *language])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and f"xseg: {place}" in capsys.readouterr().err
    assert contents(tmp_path) == {"here/FILE": b"mine"}
