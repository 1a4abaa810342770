"""COCO-VGD and COCO-interactive, and the commands that make them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import boxes, coco_file, real

from xseg.data.build import build
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import area, decode, encode, to_json
from xseg.geometry.prompts import KINDS, widen

VGD = {"json": "vgd.json", "images": "pictures", "categories": "instances.json"}
INTERACTIVE = {"json": "interactive.json", "images": "pictures"}


def built(root: Path, **options: Any) -> Path:
    """The two-picture COCO file with prompts in both layouts."""
    coco_file(root)
    assert build("vgd", root / "instances.json", root / "vgd.json", **options) == 2
    assert build("interactive", root / "instances.json", root / "interactive.json", **options) == 2
    return root


def test_what_is_built_is_read(tmp_path: Path) -> None:
    source = load_source("vgd", built(tmp_path), "train", VGD)
    assert len(source) == 1, "a picture without objects is left out"
    sample = source[0]
    coco = load_source("coco", tmp_path, "train", {"images": "pictures", "instances": "instances.json"})
    assert sample.categories == coco.categories and sample.key == "vgd/train/7"
    # the crowd and the speck of the COCO file are no objects to be prompted
    assert [(i.id, i.category) for i in sample.instances] == [(70, 0), (71, 1)]
    masks = boxes(20, 31)
    for instance, mask in zip(sample.instances, masks, strict=False):
        assert tuple(instance.prompts) == KINDS
        point = decode(instance.prompts["point"])
        assert (point & mask).any() and instance.prompts["point"]["size"] == [20, 31]


def test_interactive_has_one_object_a_sample_and_the_widths_of_its_protocol(tmp_path: Path) -> None:
    source = load_source("interactive", built(tmp_path), "val", INTERACTIVE)
    assert [s.key for s in source] == ["interactive/val/7-70", "interactive/val/7-71"]
    stored = json.loads((tmp_path / "interactive.json").read_text())[0]["anns"]
    for sample, row in zip(source, stored, strict=True):
        (instance,) = sample.instances
        assert instance.category == -1 and len(sample.masks or ()) == 1 and sample.categories is None
        thin = {kind: decode(row[f"{kind}_visual_prompt_mask"]) > 0 for kind in KINDS}
        assert thin["point"].sum() == 1
        for kind in KINDS:
            assert (decode(instance.prompts[kind]) == widen(kind, thin[kind])).all()
        assert area(instance.prompts["point"]) > 100


def test_same_input_same_bytes_however_many_work(tmp_path: Path) -> None:
    data = coco_file(tmp_path)
    first = data["annotations"][0]
    data["images"] = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 31} for i in range(70)]
    data["annotations"] = [{**first, "id": i, "image_id": i % 70} for i in range(90)]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(data))
    for name, seed, workers in (("a", 3, 1), ("b", 3, 2), ("c", 4, 1)):
        build("vgd", path, tmp_path / f"{name}.json", seed=seed, workers=workers)
    a, b, c = ((tmp_path / f"{name}.json").read_bytes() for name in "abc")
    assert a == b and a != c
    assert len(json.loads(a)) == 70


def test_nothing_is_overwritten_or_left_half(tmp_path: Path) -> None:
    data = coco_file(tmp_path)
    out = tmp_path / "out.json"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"out\.json: is there already"):
        build("vgd", tmp_path / "instances.json", out)
    assert out.read_text() == "mine"
    data["annotations"][1]["segmentation"] = {"size": [3, 3], "counts": [9]}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"annotations\[1\]: mask of size \[3, 3\]"):
        build("interactive", tmp_path / "instances.json", tmp_path / "new.json")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 77}, "record 0 annotation 70: category_id 77 is not among"),
        ({"visual_prompts": {"box_visual_prompt": {"size": [2, 2], "counts": [4]}}}, "annotation 70 box_visual_prompt"),
        ({"segmentation": "x"}, "annotation 70: segmentation 'x'"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = built(tmp_path) / "vgd.json"
    rows = json.loads(path.read_text())
    rows[0]["annotations"][0].update(change)
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=rf"vgd\.json: .*{message}"):
        load_source("vgd", tmp_path, "train", VGD)[0]


def test_missing_and_empty_prompts_are_not_drawn(tmp_path: Path) -> None:
    path = built(tmp_path) / "vgd.json"
    rows = json.loads(path.read_text())
    prompts = rows[0]["annotations"][0]["visual_prompts"]
    del prompts["box_visual_prompt"]
    prompts["mask_visual_prompt"] = to_json(encode(np.zeros((20, 31), np.uint8)))
    path.write_text(json.dumps(rows))
    assert tuple(load_source("vgd", tmp_path, "train", VGD)[0].instances[0].prompts) == ("point", "scribble")


def test_real_objects_get_prompts(tmp_path: Path) -> None:
    root = real("coco_mini")
    instances = root / "annotations/instances_val2017.json"
    count = build("interactive", instances, tmp_path / "interactive.json")
    objects = [a for a in json.loads(instances.read_text())["annotations"] if not a["iscrowd"]]
    assert 0.98 * len(objects) <= count <= len(objects)
    options = {"json": str(tmp_path / "interactive.json"), "images": str(root / "val2017")}
    source = load_source("interactive", tmp_path, "val", options)
    assert len(source) == count
    for index in range(0, count, 40):
        sample = source[index]
        assert sample.masks is not None and sample.images[0].is_file()  # type: ignore[union-attr]
        assert (decode(sample.masks.rles[0]) & decode(sample.instances[0].prompts["point"])).any()
