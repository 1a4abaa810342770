"""Exit codes and messages of the command line, in processes of their own and against a tiny random model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import save_model

from xseg.ui.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "final", ("segmentor", "siglip", "llm"), "concepts")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg")
    return tmp_path / "picture.jpg"


def xseg(*words: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "xseg.ui.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, **kwargs)  # type: ignore[call-overload]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command in this process; it must end with 2 and one message that holds ``word``."""

    def check(word: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["xseg", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert word in message and "Traceback" not in message

    return check


def test_the_five_lines_of_the_readme(model: Path, image: Path) -> None:
    from xseg import load

    predictor, processor = load(model)
    result = predictor.segment(image, "the large red circle", reject=0.0)
    assert result.mask.shape == (40, 60) and result.mask.dtype == bool
    assert 0 <= result.score <= 1 and result.found == bool(result.mask.any())
    assert [s.label for s in result.segments] == ["the large red circle"]
    assert processor.encoder is predictor.processor.encoder
    several = predictor.segment(Image.open(image), ["circle", "grass"])
    assert several.masks.shape == (len(several.segments), 40, 60)
    assert {s.label for s in several.segments} <= {"circle", "grass"}


def test_a_session_equals_encoding_anew(model: Path, image: Path) -> None:
    from xseg import load
    from xseg.infer.session import Session

    predictor, _ = load(model)
    session = Session(predictor)
    session.set_image(image)
    said = [session.ask(text, max_new_tokens=5).text for text in ("the circle", "how many?")]
    session.undo()
    assert session.ask("how many?", max_new_tokens=5).text == said[1]
    fresh = Session(predictor)
    fresh.set_image(image)
    assert fresh.ask("the circle", max_new_tokens=5).text == said[0]


def test_stage_one_refuses_text(tmp_path: Path, image: Path) -> None:
    from xseg import load
    from xseg.errors import UserError

    predictor, _ = load(save_model(tmp_path / "s1", ("segmentor",), "labels"))
    with pytest.raises(UserError, match="stage-1"):
        predictor.segment(image, "the circle")


def test_scripted_chat(model: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = xseg("chat", "--model", model, "--image", image, "--say", "the circle", "--say", "/save", "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "conversation.json").read_text())["turns"][0]["question"] == "the circle"
    assert "60 x 40" in done.stdout


def test_what_chat_refuses_leaves_nothing_behind(
    model: Path, image: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    say = ("--say", "the circle", "--out", out)
    refused("missing.png", "chat", "--model", model, "--image", tmp_path / "missing.png", *say)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(image.read_bytes()[:600])
    done = xseg("chat", "--model", model, "--image", broken, *say)
    assert done.returncode == 2 and "broken.jpg" in done.stderr and "Traceback" not in done.stderr
    refused("config.json", "chat", "--model", tmp_path, "--image", image, *say)
    refused("no image", "chat", "--model", model, *say)
    assert not out.exists()


def test_chat_without_a_model_opens_the_shipped_one(
    model: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]
) -> None:
    from xseg import load, paths

    far = tmp_path / "far"
    far.mkdir()
    monkeypatch.chdir(far)
    monkeypatch.setattr(paths, "SHIPPED", (tmp_path / "checkout", tmp_path / "wheel"))
    words = ("chat", "--image", image, "--say", "the circle", "--out", tmp_path / "out")
    for place in ("checkout/examples/tiny_model", "wheel/examples/tiny_model", "--model DIR"):
        refused(place, *words)
    with pytest.raises(ValueError, match="no model was named"):
        load()
    assert not (tmp_path / "out").exists()
    shutil.copytree(model, tmp_path / "wheel/examples/tiny_model")
    monkeypatch.setattr(sys, "argv", ["xseg", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert load(device="cpu")[0].segment(image, "the circle", reject=0.0).mask.shape == (40, 60)


def test_export_on_the_command_line(model: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    out = tmp_path / "out"
    refused("no model here", "export", tmp_path, "--out", out)
    refused("did you mean 'bf16'", "export", model, "--out", out, "--dtype", "bf61")
    done = xseg("export", model, "--out", out, "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert "mean IoU 1.0000" in done.stdout and "36 of 36 answers equal" in done.stdout
    done = xseg("chat", "--model", out, "--image", "examples/tiny_model/example.png", "--say", "the star", cwd=tmp_path)
    assert done.returncode == 0 and "96 x 96" in done.stdout, done.stderr


def test_typed_chat_survives_mistakes(model: Path, image: Path, tmp_path: Path) -> None:
    typed = "the circle\n/image missing.png\n/imag\n/undo\n/quit\n"
    done = xseg("chat", "--model", model, "--out", tmp_path / "out", "--image", image, input=typed)
    assert done.returncode == 0, done.stderr
    for word in ("missing.png", "did you mean '/image'", "forgotten"):
        assert word in " ".join(done.stdout.split())


def test_other_wrong_input(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused("did you mean 'shapes'", "eval", "--model", tmp_path, "--suite", "shape", "--out", tmp_path / "o")
    refused("results.json", "report", tmp_path / "nothing")
    refused(str(tmp_path), "data", "show", "shapes/refer_val", "--root", tmp_path, "--out", tmp_path / "o")
    refused("tinny", "demo", "--recipe", "tinny", "--out", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_shapes_show_and_eval(model: Path, tmp_path: Path) -> None:
    shapes = tmp_path / "data/shapes"
    size = ("--images", 3, "--val-images", 2, "--size", 64)
    done = xseg("data", "shapes", "--out", shapes, *size, "--tasks", 2, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in shapes.iterdir()} == {"train", "val", "val_open", "overfit", "clips"}
    done = xseg("data", "show", "shapes/reason_val", "-n", 1, "--root", tmp_path / "data", "--out", tmp_path / "riddle")
    assert done.returncode == 0 and "<SEG>" in done.stdout, done.stderr
    done = xseg("data", "show", "shapes/refer_train", "-n", 1, "--root", tmp_path / "data", "--out", tmp_path / "show")
    assert done.returncode == 0 and "<SEG>" in done.stdout and "query 0" in done.stdout, done.stderr
    [picture] = (tmp_path / "show").iterdir()
    assert Image.open(picture).size == (320, 320)
    out = ("--out", tmp_path / "eval", "--root", tmp_path / "data")
    done = xseg("eval", "--model", model, "--suite", "shapes", *out)
    assert done.returncode == 0, done.stderr
    assert "cIoU" in done.stdout and "samples/s" in done.stdout
    assert json.loads((tmp_path / "eval/results.json").read_text())["suite"] == "shapes"


def test_help_names_every_command() -> None:
    done = xseg("--help")
    assert done.returncode == 0
    for command in ("demo", "eval", "chat", "export", "report", "data"):
        assert command in done.stdout
    assert xseg("--version").stdout.strip()
