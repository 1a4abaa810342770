"""What commands say of an --out that cannot be written: exit status 2 and one message, before the work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import save_model

from xseg.infer import session
from xseg.types import Segment
from xseg.ui.cli import main

PLACES = ("FILE", "FILE/below", "/proc/x")
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "final", ("segmentor", "siglip", "llm"), "concepts")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A COCO file with one picture and one object, a recipe for it, and a suite of it."""
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "1.jpg")
    box = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[5, 5, 35, 5, 35, 30, 5, 30]]}
    image = {"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}
    coco = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "box"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    options = "{images: ., instances: coco.json}"
    (tmp_path / "mine.yaml").write_text(
        f"source: coco\noptions: {options}\ntask: generic_seg\nsplit: val\nlicence: x\n"
    )
    (tmp_path / "suite.yaml").write_text(f"name: mine\nrows: [{tmp_path}/mine.yaml]\n")
    (tmp_path / "FILE").write_text("mine")
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit status, errors)."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["xseg", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "words",
    [
        ("chat", "--model", "MODEL", "--image", "DIR/1.jpg", "--say", "the box"),
        ("chat", "--model", "MODEL", "--image", "DIR/1.jpg", "--say", "/save"),
        ("eval", "--model", "MODEL", "--suite", "DIR/suite.yaml", "--root", "DIR"),
        ("data", "show", "DIR/mine.yaml", "--root", "DIR"),
        ("data", "convert", "coco", "DIR/coco.json", "--images", "DIR"),
        ("data", "build-vgd", "DIR/coco.json"),
        ("data", "build-interactive", "DIR/coco.json"),
        ("data", "shapes", "--images", "1", "--val-images", "1"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_a_bad_out_is_one_message(run: Run, model: Path, data: Path, words: tuple[str, ...], place: str) -> None:
    before = sorted(os.listdir(data))
    out = place.replace("FILE", str(data / "FILE"))
    status, error = run(*(w.replace("MODEL", str(model)).replace("DIR", str(data)) for w in words), "--out", out)
    assert status == 2 and str(Path(out).parent) in error and error.count("xseg: ") == 1, error
    assert sorted(os.listdir(data)) == before and (data / "FILE").read_text() == "mine"


def test_a_long_id_is_shown(run: Run, data: Path) -> None:
    text = (data / "coco.json").read_text()
    (data / "coco.json").write_text(
        text.replace('"id": 1, "file_name"', f'"id": "{"x" * 400}", "file_name"').replace(
            '"image_id": 1', f'"image_id": "{"x" * 400}"'
        )
    )
    status, error = run("data", "show", data / "mine.yaml", "--root", data, "--out", data / "show")
    assert status == 0, error
    [picture] = (data / "show").iterdir()
    assert "xxx" in picture.name and len(picture.name) < 255


def test_a_long_file_name_gets_its_masks(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def one(self: Any, found: Any, phrases: Any) -> tuple[Segment, ...]:
        return (Segment(session.empty((40, 60)), label="box"),)

    def asked(self: Any, text: str) -> session.Answer:
        self.answers.append(session.Answer(text, "it is <SEG>", one(self, (), ())))
        return self.answers[-1]

    monkeypatch.setattr(session.Session, "ask", asked)
    picture = (data / "1.jpg").rename(data / f"{'x' * 250}.jpg")
    words = ("--image", picture, "--say", "the box", "--out", data / "out")
    status, error = run("chat", "--model", model, *words)
    assert status == 0 and len(list((data / "out").iterdir())) == 2, error


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_typed_chat_survives_bad_places_and_bytes(model: Path, data: Path, errors: str) -> None:
    """Bytes that are no UTF-8 arrive in either way, as the locale has it."""
    typed = f"/save {data}/FILE\n/save {data}/FILE/below\n/save /proc/x\n".encode() + b"the \xff box\n/image \xff.jpg\n"
    command = [sys.executable, "-m", "xseg.ui.cli", "chat", "--model", str(model), "--image", str(data / "1.jpg")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "PYTHONIOENCODING": f"utf8:{errors}"}
    done = subprocess.run(
        [*command, "--out", str(data / "out")],
        input=typed + f"/save {data}/good\n/quit\n".encode(),
        capture_output=True,
        env=environment,
        timeout=200,
    )
    said = done.stdout.decode()
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert said.count("nothing can be written there") == 3 and "no UTF-8 text" in said and "\ufffd.jpg" in said
    assert (data / "good/conversation.json").is_file()


def test_bytes_on_the_command_line_are_refused(run: Run, model: Path, data: Path) -> None:
    words = ("--image", data / "1.jpg", "--say", "the \udcff box", "--out", data / "out")
    status, error = run("chat", "--model", model, *words)
    assert status == 2 and "no UTF-8 text" in error and not (data / "out").exists()
