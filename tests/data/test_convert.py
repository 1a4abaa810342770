import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import boxes, coco_file, noise, panoptic_file, real
from PIL import Image

from xseg.config import DataRecipe, load_recipe
from xseg.data.convert import convert
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import dense
from xseg.types import Sample

MASKS = boxes(20, 31)


def opened(out: Path) -> tuple[DataRecipe, list[Sample]]:
    """The recipe that convert wrote, and its samples, with their pictures there."""
    recipe = load_recipe(DataRecipe, str(out / "recipe.yaml"))
    source = load_source(recipe.source, out, recipe.split, recipe.options)
    samples = [source[i] for i in range(len(source))]
    assert recipe.count == len(samples) and all(i.is_file() for s in samples for i in s.images)  # type: ignore[union-attr]
    return recipe, samples


def test_coco(tmp_path: Path) -> None:
    coco_file(tmp_path)
    assert convert("coco", tmp_path / "instances.json", tmp_path / "a/out", tmp_path / "pictures") == 2
    recipe, (first, bare) = opened(tmp_path / "a/out")
    original = load_source("coco", tmp_path, "train", {"images": "pictures", "instances": "instances.json"})[0]
    assert recipe.task.name == "generic_seg" and recipe.options["categories"] == ["wall", "potted plant"]
    assert (dense(first.masks) == dense(original.masks)).all() and first.instances == original.instances  # type: ignore[arg-type]
    assert bare.instances == () and bare.size == (16, 12)


def test_coco_panoptic_keeps_its_stuff(tmp_path: Path) -> None:
    panoptic_file(tmp_path)
    convert("coco", tmp_path / "panoptic.json", tmp_path / "out", tmp_path / "pictures")
    recipe, (sample,) = opened(tmp_path / "out")
    assert recipe.options["stuff"] == ["wall"] and (dense(sample.masks) == MASKS).all()  # type: ignore[arg-type]


def labelme(root: Path, *shapes: dict[str, Any]) -> Path:
    (root / "labelme").mkdir(exist_ok=True)
    noise(20, 31).save(root / "labelme/a.jpg")
    record = {"imagePath": "a.jpg", "imageHeight": 20, "imageWidth": 31, "shapes": list(shapes)}
    (root / "labelme/a.json").write_text(json.dumps(record))
    return root / "labelme"


def test_labelme(tmp_path: Path) -> None:
    shapes = (
        {"label": "tree", "points": [[0, 0], [15, 0], [15, 10], [0, 10]], "shape_type": "polygon"},
        {"label": "car", "points": [[30, 10], [15, 0]], "shape_type": "rectangle", "group_id": 1},
        {"label": "car", "points": [[5, 15], [5, 18]], "shape_type": "circle", "group_id": 1},
        {"label": "car", "points": [[20, 15], [20, 17]], "shape_type": "circle"},
    )
    convert("labelme", labelme(tmp_path, *shapes), tmp_path / "out")
    recipe, (sample,) = opened(tmp_path / "out")
    assert recipe.options["categories"] == ["car", "tree"]
    assert [i.category for i in sample.instances] == [1, 0, 0]
    found = dense(sample.masks)  # type: ignore[arg-type]
    assert found[0].sum() == pytest.approx(150, abs=15) and found[1].sum() == pytest.approx(150 + np.pi * 9, abs=6)
    assert found[1, 5, 20] and found[1, 15, 5] and found[2, 15, 20] and not found[2, 5, 20]


def test_png_masks_by_category_and_by_object(tmp_path: Path) -> None:
    source = tmp_path / "pngs"
    for folder in ("images", "masks/cat", "masks/dog"):
        (source / folder).mkdir(parents=True)
    noise(20, 31).save(source / "images/a.jpg")
    noise(20, 31).save(source / "images/without.jpg")
    Image.fromarray(MASKS[0] * 255).save(source / "masks/cat/a.png")
    Image.fromarray(MASKS[1]).save(source / "masks/dog/a.png")
    convert("png-masks", source, tmp_path / "out")
    recipe, (sample,) = opened(tmp_path / "out")
    assert recipe.options["categories"] == ["cat", "dog"] and [i.category for i in sample.instances] == [0, 1]
    assert (dense(sample.masks) == MASKS[:2]).all()  # type: ignore[arg-type]
    objects = tmp_path / "objects"
    (objects / "masks").mkdir(parents=True)
    Image.fromarray((MASKS * np.array([3, 7, 9], np.uint8)[:, None, None]).sum(0).astype(np.uint8)).save(
        objects / "masks/a.png"
    )
    convert("png-masks", objects, tmp_path / "out2", source / "images")
    recipe, (sample,) = opened(tmp_path / "out2")
    assert recipe.task.name == "interactive_seg", "masks without a name can only be pointed at"
    assert (dense(sample.masks) == MASKS).all()  # type: ignore[arg-type]


def test_lisa(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    noise(20, 31).save(folder / "a.jpg")
    shapes = [
        {"label": "target", "points": [[0, 0], [14, 0], [14, 9], [0, 9]]},
        {"label": "ignore", "points": [[20, 2], [25, 2], [25, 8]]},
    ]
    record = {"text": ["What barks?", "the barking one"], "is_sentence": True, "shapes": shapes}
    (folder / "a.json").write_text(json.dumps(record))
    assert convert("lisa", folder, tmp_path / "out") == 1
    recipe, (sample,) = opened(tmp_path / "out")
    original = load_source("reason", tmp_path, "train", {"folder": "."})[0]
    assert recipe.task.name == "reason_seg" and sample.ignore == original.ignore and sample.ignore is not None
    assert [(p.text, p.instances, p.kind) for p in sample.phrases] == [
        ("What barks?", (0,), "long"),
        ("the barking one", (0,), "long"),
    ]
    assert (dense(sample.masks) == MASKS[:1]).all()  # type: ignore[arg-type]
    assert recipe.split == "train"
    folder.rename(tmp_path / "val")
    assert convert("lisa", tmp_path / "val", tmp_path / "held") == 2
    recipe, each = opened(tmp_path / "held")
    assert recipe.split == "val" and [len(sample.phrases) for sample in each] == [1, 1], "each question is scored alone"


def test_sa2va(tmp_path: Path) -> None:
    (tmp_path / "mine/images").mkdir(parents=True)
    noise(20, 31).save(tmp_path / "mine/images/a.jpg")
    polygon = [[0, 0, 15, 0, 15, 10, 0, 10]]
    rows = [{"image": "a.jpg", "mask": [polygon, [*polygon, [20, 0, 25, 0, 25, 5]]], "text": ["one", "both "]}]
    (tmp_path / "mine/annotations.json").write_text(json.dumps(rows))
    convert("sa2va", tmp_path / "mine", tmp_path / "out")
    recipe, (sample,) = opened(tmp_path / "out")
    assert recipe.task.name == "refer_seg" and [p.text for p in sample.phrases] == ["one", "both"]
    assert [p.instances for p in sample.phrases] == [(0,), (1,)]
    assert dense(sample.masks)[:, 2, 23].tolist() == [0, 1]  # type: ignore[arg-type]
    rows[0]["text"] = ["one"]
    (tmp_path / "mine/annotations.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"annotations\.json: record 0: 2 masks and 1 texts"):
        convert("sa2va", tmp_path / "mine", tmp_path / "out2")


def test_wrong_input_leaves_nothing_behind(tmp_path: Path) -> None:
    coco_file(tmp_path)
    line = {"label": "x", "points": [[0, 0], [3, 3]], "shape_type": "line"}
    bad = labelme(tmp_path, {"label": "a", "points": [[0, 0], [3, 0], [3, 3]]}, line)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = set(tmp_path.rglob("*"))
    for words, message in (
        (
            ("cocoo", tmp_path / "instances.json", tmp_path / "out"),
            "no such layout to convert from; did you mean 'coco'",
        ),
        (("coco", tmp_path / "no.json", tmp_path / "out"), "no such file or folder"),
        (("coco", tmp_path / "instances.json", tmp_path / "out"), "--images DIR"),
        (("coco", tmp_path / "instances.json", tmp_path / "full", tmp_path), "is there already"),
        (("labelme", bad, tmp_path / "out"), r"a\.json: shapes\[1\]: shape_type 'line'"),
        (("labelme", tmp_path / "empty", tmp_path / "out"), "nothing to convert there"),
        (("png-masks", tmp_path / "empty", tmp_path / "out"), "masks: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*words)
        assert set(tmp_path.rglob("*")) == before


def test_a_mask_without_its_picture(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    noise(20, 31).save(tmp_path / "images/a.jpg")
    Image.fromarray(MASKS[0]).save(tmp_path / "masks/a.png")
    Image.fromarray(MASKS[0]).save(tmp_path / "masks/b.png")
    with pytest.raises(UserError, match=r"b\.png: a mask without its picture"):
        convert("png-masks", tmp_path, tmp_path / "out")


def test_real_coco(tmp_path: Path) -> None:
    root = real("coco_mini")
    assert convert("coco", root / "annotations/instances_val2017.json", tmp_path / "out", root / "val2017") == 79
    _, samples = opened(tmp_path / "out")
    assert sum(len(s.instances) for s in samples) == 624
