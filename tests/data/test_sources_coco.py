import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import boxes, coco_file, panoptic_file, real

from xseg.data.sources import load_source
from xseg.data.sources.coco import clean_name
from xseg.errors import UserError
from xseg.geometry.masks import dense

INSTANCES = {"images": "pictures", "instances": "instances.json"}
PANOPTIC = {"images": "pictures", "panoptic_json": "panoptic.json"}


def test_instances_in_every_coco_form(tmp_path: Path) -> None:
    coco_file(tmp_path)
    source = load_source("coco", tmp_path, "val", {**INSTANCES, "name": "mini"})
    sample, bare = source[0], source[1]
    assert (len(source), sample.key, bare.key) == (2, "mini/val/7", "mini/val/9")
    assert [(i.id, i.category, i.is_crowd) for i in sample.instances] == [(70, 0, False), (71, 1, False), (72, 0, True)]
    assert sample.masks is not None
    found, wanted = dense(sample.masks), boxes(20, 31)
    assert (found[1:] == wanted[1:]).all() and np.abs(found[0].astype(int) - wanted[0]).sum() <= 15
    assert source.categories is not None
    assert source.categories.names == ("wall", "potted plant") and source.categories.ids == (5, 2)
    assert bare.instances == () and bare.size == (16, 12) and bare.images == (tmp_path / "pictures/9.png",)
    assert [s.key for s in source] == ["mini/val/7", "mini/val/9"]


def test_a_recipe_may_name_its_images(tmp_path: Path) -> None:
    coco_file(tmp_path)
    source = load_source("coco", tmp_path, "val", {**INSTANCES, "image_ids": [9, 7]})
    assert [s.image_id for s in source] == [9, 7]
    with pytest.raises(UserError, match=r"image_ids: \[8\] not among its 2 images"):
        load_source("coco", tmp_path, "val", {**INSTANCES, "image_ids": [9, 8]})


def test_files_may_be_called_otherwise(tmp_path: Path) -> None:
    coco_file(tmp_path)
    (sample, _) = load_source("coco", tmp_path, "val", {**INSTANCES, "images": "pictures/{id:03d}.png"})
    assert sample.images == (tmp_path / "pictures/007.png",)
    with pytest.raises(UserError, match=r"images: '\{name\}\.png' does not fit an image record"):
        load_source("coco", tmp_path, "val", {**INSTANCES, "images": "pictures/{name}.png"})


def test_real_lvis() -> None:
    root = real("lvis")
    source = load_source("coco", root, "val", {"images": "images/{id:012d}.jpg", "instances": "lvis_subset.json"})
    samples = list(source)
    assert len(samples) == 7 and sum(len(s.instances) for s in samples) == 52
    assert all(s.images[0].is_file() for s in samples)  # type: ignore[union-attr]
    assert source.categories is not None and "alarm clock" in source.categories.names


def test_panoptic_ids_crowd_and_stuff(tmp_path: Path) -> None:
    panoptic_file(tmp_path)
    source = load_source("coco", tmp_path, "val", PANOPTIC)
    sample = pickle.loads(pickle.dumps(source))[0]
    assert sample.masks is not None and (dense(sample.masks) == boxes(20, 31)).all()
    assert [(i.id, i.category, i.is_crowd) for i in sample.instances] == [
        (300, 0, False),
        (70000, 1, False),
        (5, 0, True),
    ]
    assert sample.categories is not None and sample.categories.is_thing == (False, True)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("wall-other-merged", "wall"),
        ("floor-wood", "floor wood"),
        ("door-stuff", "door"),
        ("TV", "tv"),
        ("cabinet, closet", "cabinet"),
    ],
)
def test_names_are_cleaned(raw: str, clean: str) -> None:
    assert clean_name(raw) == clean


def change(folder: Path, file: str, edit: Any) -> None:
    data = json.loads((folder / file).read_text())
    edit(data)
    (folder / file).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda d: d["annotations"][1]["segmentation"].update(size=[31, 20]),
            r"instances\.json: image 7 annotation 71",
        ),
        (lambda d: d["annotations"][0].update(category_id=8), r"image 7: annotation 70: category_id 8"),
        (lambda d: d["annotations"][0].update(image_id=8), r"annotation 70: image_id 8"),
        (lambda d: d["annotations"][0].pop("segmentation"), r"annotation 70: key 'segmentation' is missing"),
        (lambda d: d["images"][1].pop("height"), r"images\[1\]: key 'height' is missing"),
        (lambda d: d.pop("categories"), r"key 'categories' is missing"),
        (lambda d: d.update(annotations={}), r"'annotations' is a dict"),
    ],
)
def test_a_wrong_annotation_is_named_with_its_place(tmp_path: Path, edit: Any, message: str) -> None:
    coco_file(tmp_path)
    change(tmp_path, "instances.json", edit)
    with pytest.raises(UserError, match=message):
        load_source("coco", tmp_path, "val", INSTANCES)[0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["images"][0].update(height=21), r"coco/val/7: .*7\.png is \[20, 31\].*\[21, 31\]"),
        (
            lambda d: d["annotations"][0]["segments_info"][1].update(category_id=3),
            r"image 7 annotation 70000: category",
        ),
        (lambda d: d["annotations"][0].update(file_name="8.png"), r"8\.png: no such panoptic PNG"),
        (lambda d: d["annotations"][0].update(image_id=8), r"image 8: a panoptic record"),
    ],
)
def test_a_wrong_panoptic_record_is_named_with_its_place(tmp_path: Path, edit: Any, message: str) -> None:
    panoptic_file(tmp_path)
    change(tmp_path, "panoptic.json", edit)
    with pytest.raises(UserError, match=message):
        load_source("coco", tmp_path, "val", PANOPTIC)[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cocoo", INSTANCES, "did you mean 'coco'"),
        ("coco", {**INSTANCES, "image": "x"}, "unknown option 'image'; did you mean 'images'"),
        ("coco", {"instances": "instances.json"}, "option 'images' is missing"),
        ("coco", {"images": "pictures"}, "exactly one"),
        ("coco", {**INSTANCES, **PANOPTIC}, "exactly one"),
        ("coco", {**INSTANCES, "instances": "no.json"}, r"no\.json: no such annotation file"),
        ("coco", {**INSTANCES, "instances": "pictures/7.png"}, r"7\.png: the annotation file cannot be read"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    coco_file(tmp_path)
    with pytest.raises(UserError, match=message):
        load_source(name, tmp_path, "val", options)


def test_real_instances_agree_with_pycocotools() -> None:
    from pycocotools.coco import COCO

    root = real("coco_mini")
    options = {"images": "val2017", "instances": "annotations/instances_val2017.json"}
    source = load_source("coco", root, "val", options)
    assert len(source) == 79 and sum(len(s.instances) for s in source) == 624
    assert sum(i.is_crowd for s in source for i in s.instances) == 5
    api = COCO(str(root / "annotations/instances_val2017.json"))
    for sample in source:
        assert sample.masks is not None and sample.images[0].is_file()  # type: ignore[union-attr]
        for instance, mask in zip(sample.instances, dense(sample.masks), strict=True):
            assert (mask == api.annToMask(api.anns[instance.id])).all()


def test_real_panoptic_areas_equal_the_json() -> None:
    root = real("coco_panoptic")
    options = {"images": "input_images", "panoptic_json": "panoptic_examples.json"}
    source = load_source("coco", root, "val", options)
    data = json.loads((root / "panoptic_examples.json").read_text())
    for sample, record in zip(source, data["annotations"], strict=True):
        assert sample.masks is not None
        areas = dense(sample.masks).sum(axis=(1, 2))
        assert areas.tolist() == [s["area"] for s in record["segments_info"]]
    assert source.categories is not None and len(source.categories.names) == 133
    assert {"wall", "floor wood", "tree"} <= set(source.categories.names)
