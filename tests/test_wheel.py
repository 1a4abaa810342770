"""The package as users install it: a wheel, not this checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, far from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_recipes_are_found_by_name(installed: Path, tmp_path: Path) -> None:
    code = (
        "import xseg; from xseg.train.stage import read_stage\n"
        "from xseg.config import Suite, load_recipe\nfrom xseg.paths import find\n"
        "print(xseg.__file__, read_stage('tiny/s1_segmentor').model.sam['patch_size'])\n"
        "load_recipe(Suite, 'shapes'); print(find('phi3', 'chat_templates', '.jinja'))"
    )
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout and str(ROOT / "xseg") not in done.stdout


def test_the_command_line_runs_and_names_what_is_missing(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "-m", "xseg.ui.cli", "--version").returncode == 0
    done = run(installed, tmp_path, "-m", "xseg.ui.cli", "data", "show", "shapes/panoptic_train", "--root", "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_examples_are_found_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = (
        "from xseg.paths import default_model, find\n"
        "print(find('examples/tiny_model/example.png', 'train_stages/models', suffix=''))\n"
        "print(default_model())"
    )
    shipped = installed / "xseg/assets/examples/tiny_model"
    mark = shipped / "config.json"
    stored = mark.read_bytes() if mark.exists() else None
    mark.write_text("{}")
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(shipped / "example.png"), str(shipped)]
    mark.unlink()
    done = run(installed, tmp_path, "-m", "xseg.ui.cli", "chat", "--say", "hello")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no model was named" in done.stderr and str(shipped) in done.stderr
    if stored is not None:
        mark.write_bytes(stored)


def test_the_shipped_model_answers_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    if not (installed / "xseg/assets/examples/tiny_model/config.json").is_file():
        pytest.skip("examples/tiny_model holds no weights yet: make train-long")
    talk = ("chat", "--image", "examples/tiny_model/example.png", "--say", "the large blue square", "--out", "out")
    done = run(installed, tmp_path, "-m", "xseg.ui.cli", *talk)
    assert done.returncode == 0, done.stderr
    assert "% of the image" in done.stdout and (tmp_path / "out/example-01.png").is_file()
