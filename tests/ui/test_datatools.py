"""``xseg data convert``, ``lint``, ``build-vgd``, ``build-interactive`` and ``show`` from the command line."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xseg.ui.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit status, output, errors)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xseg", "data", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two pictures with an object each."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in (1, 2):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / f"images/{number}.jpg")
    polygon = [[5, 5, 35, 5, 35, 30, 5, 30]]
    common = {"category_id": 1, "iscrowd": 0, "segmentation": polygon}
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in (1, 2)],
        "annotations": [{**common, "id": i, "image_id": i} for i in (1, 2)],
        "categories": [{"id": 1, "name": "box"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return path


def test_convert_lint_show(run: Run, coco: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "mine", tmp_path / "images"
    status, said, _ = run("convert", "coco", coco, "--images", pictures, "--out", out)
    assert status == 0 and said.startswith("2 samples in ")
    status, said, _ = run("lint", out / "recipe.yaml", "--root", out)
    assert status == 0 and said.endswith("2 samples, no fault\n")
    status, said, _ = run("show", out / "recipe.yaml", "--root", out, "-n", 1, "--out", tmp_path / "show")
    assert status == 0 and "box" in said
    with Image.open(next((tmp_path / "show").iterdir())) as drawn:
        assert drawn.width == 300, "small pictures are enlarged"
    (pictures / "2.jpg").unlink()
    status, said, _ = run("lint", out / "recipe.yaml", "--root", out)
    assert status == 1 and "1 image missing" in said and "2.jpg does not exist" in said


def test_a_mixture_is_linted_whole(run: Run, coco: Path, tmp_path: Path) -> None:
    options = "{images: images, instances: instances.json}"
    for split in ("train", "val"):
        text = f"source: coco\noptions: {options}\ntask: generic_seg\nsplit: {split}\nlicence: ours\n"
        (tmp_path / f"{split}.yaml").write_text(text)
    (tmp_path / "both.yaml").write_text("datasets: [train, val]\n")
    status, said, _ = run("lint", tmp_path / "both.yaml", "--root", tmp_path)
    assert status == 1 and "train trains on 2 pictures of val (val)" in said
    status, said, _ = run("lint", tmp_path / "train.yaml", "--root", tmp_path)
    assert status == 0


@pytest.mark.parametrize("layout", ["vgd", "interactive"])
def test_prompts_are_built(run: Run, coco: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / f"{layout}.json"
    status, said, _ = run(f"build-{layout}", coco, "--out", out, "--seed", 3)
    assert status == 0 and "2 objects with prompts" in said and len(json.loads(out.read_text())) == 2
    status, _, error = run(f"build-{layout}", coco, "--out", out)
    assert status == 2 and "is there already" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "coc", "SRC", "--out", "OUT"), "did you mean 'coco'"),
        (("convert", "lisa", "SRC/no", "--out", "OUT"), "no such file or folder to convert"),
        (("build-vgd", "SRC/no.json", "--out", "OUT/a.json"), "no such annotation file"),
        (("lint", "nothing/like_this"), "no recipe of that name"),
    ],
)
def test_wrong_input_is_one_message(run: Run, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    named = [w.replace("SRC", str(tmp_path)).replace("OUT", str(tmp_path / "out")) for w in words]
    status, _, error = run(*named)
    assert status == 2 and message in error and "Traceback" not in error
    assert not any((tmp_path / "out").glob("*"))


FEW = "{name: generic_seg, max_concepts: 20}"
"""The small model's text has no room for all names of a real set."""
REAL = {
    "coco_mini": ("coco", "{images: val2017, instances: annotations/instances_val2017.json}", FEW),
    "coco_panoptic": (
        "coco",
        "{images: input_images, panoptic_json: panoptic_examples.json, panoptic_dir: panoptic_examples}",
        FEW,
    ),
    "coco_refexp": ("refer", "{images: images, refs: refs.json, instances: instances.json}", "refer_seg"),
    "ade20k": (
        "semantic",
        "{images: images, labels: annotations, names: objectInfo150.txt, first: 1}",
        FEW,
    ),
    "lvis": ("coco", "{images: 'images/{id:012d}.jpg', instances: lvis_subset.json}", FEW),
    "pope": ("pope", "{json: pope_subset.json, images: images}", "conversation"),
    "davis16": ("frames", "{frames: JPEGImages/480p, masks: Annotations/480p, binary: true}", "interactive_seg"),
    "vos_multi": ("frames", "{frames: cutie/images, masks: cutie/masks, clips: [bike]}", "interactive_seg"),
    "semseg_misc": (
        "semantic",
        "{images: loveda/img_dir, labels: loveda/ann_dir, names: [a, b, c, d, e, f, g], first: 1}",
        FEW,
    ),
}
FAULTS = {"vos_multi": ["image size: frames/val/judo/00005"]}
"""What is wrong with the real sets: one mask of a clip is a column narrower than its frame."""


def real_recipe(name: str, folder: Path) -> tuple[Path, Path]:
    """(recipe, data root) of a real set; skips where XSEG_REAL does not name them."""
    root = os.environ.get("XSEG_REAL")
    if not root:
        pytest.skip("XSEG_REAL is not set: real images and annotations are not at hand")
    source, options, task = REAL[name]
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"source: {source}\noptions: {options}\ntask: {task}\nsplit: val\nlicence: its own\n")
    return recipe, Path(root) / name


@pytest.mark.parametrize("name", [name for name in REAL if name != "davis16"])
def test_real_sets_are_linted(run: Run, tmp_path: Path, name: str) -> None:
    recipe, root = real_recipe(name, tmp_path)
    if name == "vos_multi":
        recipe.write_text(recipe.read_text().replace(", clips: [bike]", ""))
    status, said, _ = run("lint", recipe, "--root", root)
    found = [line.strip() for line in said.splitlines()[1:]]
    assert len(found) == len(FAULTS.get(name, [])) and status == bool(found), said
    assert all(line.startswith(start) for line, start in zip(found, FAULTS.get(name, []), strict=True))


def test_a_real_clip_is_linted(run: Run, tmp_path: Path) -> None:
    recipe, root = real_recipe("davis16", tmp_path)
    recipe.write_text(recipe.read_text().replace("binary: true", "binary: true, clips: [camel]"))
    status, said, _ = run("lint", recipe, "--root", root)
    assert status == 0 and said.endswith("10 samples, no fault\n")


@pytest.mark.parametrize("name", REAL)
def test_real_sets_are_shown(run: Run, tmp_path: Path, name: str) -> None:
    recipe, root = real_recipe(name, tmp_path)
    status, said, error = run("show", recipe, "--root", root, "-n", 1, "--out", tmp_path / "show")
    assert status == 0, error
    assert len(list((tmp_path / "show").glob("*.png"))) == 1 and "ids," in said
