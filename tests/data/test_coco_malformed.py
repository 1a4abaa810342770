"""What a COCO file may hold by mistake: one message with its place from every reader, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_stubs import coco_file, panoptic_file

from xseg.data.build import build
from xseg.data.convert import convert
from xseg.data.sources import load_source
from xseg.errors import UserError

INSTANCES = {"images": "pictures", "instances": "instances.json"}
PANOPTIC = {"images": "pictures", "panoptic_json": "panoptic.json"}
Edit = Callable[[dict[str, Any]], Any]


def changed(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def rename(data: dict[str, Any], names: list[str]) -> None:
    for category, name in zip(data["categories"], names, strict=True):
        category["name"] = name


def read_all(root: Path, options: dict[str, str]) -> list[Any]:
    source = load_source("coco", root, "val", options)
    return [source[i] for i in range(len(source))]


EVERYWHERE: list[tuple[Edit, str]] = [
    (lambda d: d["images"][0].update(height="427"), r"images\[0\]: height: '427' must be a whole number of 1 or more"),
    (lambda d: d["images"][0].update(width=-4), r"images\[0\]: width: -4 must be a whole number of 1 or more"),
    (lambda d: d["images"][1].update(height=0), r"images\[1\]: height: 0 must be"),
    (lambda d: d["images"][1].update(height=True), r"images\[1\]: height: True must be"),
    (lambda d: d["images"][0].update(file_name=None), r"images\[0\]: file_name: None must be a text"),
    (lambda d: d["images"][0].update(id=[7]), r"images\[0\]: id: \[7\] is no id"),
    (lambda d: d["images"].append(None), r"images\[2\]: expected a record"),
    (lambda d: d["annotations"].insert(0, None), r"annotations\[0\]: expected a record"),
    (lambda d: d["annotations"].insert(0, "x"), r"annotations\[0\]: expected a record .*'x'"),
    (lambda d: d["annotations"][1].update(image_id=[7]), r"image_id: \[7\] is no id"),
    (lambda d: d["annotations"][1].update(iscrowd="0"), r"iscrowd: '0' must be 0 or 1"),
    (lambda d: d["annotations"][1].update(segmentation={"size": 5, "counts": [3]}), r"mask of size 5 "),
    (lambda d: d["annotations"][1]["segmentation"].update(counts=None), r"RLE counts None are neither"),
    (lambda d: d["annotations"][1]["segmentation"].update(counts=[[1], [2, 3]]), r"RLE counts \[\[1\], .* are neither"),
]


@pytest.mark.parametrize(("edit", "message"), EVERYWHERE)
def test_every_reader_names_the_record(tmp_path: Path, edit: Edit, message: str) -> None:
    coco_file(tmp_path)
    path = tmp_path / "instances.json"
    changed(path, edit)
    before = set(tmp_path.rglob("*"))
    for read in (
        lambda: read_all(tmp_path, INSTANCES),
        lambda: convert("coco", path, tmp_path / "out", tmp_path / "pictures"),
        lambda: build("vgd", path, tmp_path / "vgd.json"),
    ):
        with pytest.raises(UserError, match=r"instances\.json: .*" + message):
            read()
        assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["annotations"][1].update(category_id=[2]), r"annotation 71: category_id \[2\] is not among"),
        (lambda d: d["annotations"][1].update(id=None), r"image 7: id: None is no id"),
        (lambda d: d["categories"][1].update(id="2"), r"categories\[1\]: id: '2' must be a whole number"),
        (lambda d: d["categories"][1].update(isthing="0"), r"categories\[1\]: isthing: '0' must be 0 or 1"),
        (lambda d: d["categories"].append(None), r"categories\[2\]: expected a record"),
    ],
)
def test_categories_are_checked(tmp_path: Path, edit: Edit, message: str) -> None:
    coco_file(tmp_path)
    changed(tmp_path / "instances.json", edit)
    with pytest.raises(UserError, match=r"instances\.json: .*" + message):
        read_all(tmp_path, INSTANCES)


def test_a_name_pattern_meets_a_record_that_is_none(tmp_path: Path) -> None:
    coco_file(tmp_path)
    changed(tmp_path / "instances.json", lambda d: d["images"].append(None))
    with pytest.raises(UserError, match=r"does not fit an image record"):
        read_all(tmp_path, {**INSTANCES, "images": "pictures/{id:03d}.png"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["annotations"].append(None), r"annotations\[1\]: expected a record"),
        (lambda d: d["annotations"][0].update(image_id=[7]), r"annotations\[0\]: image_id: \[7\] is no id"),
        (lambda d: d["annotations"][0].update(file_name=None), r"image 7: file_name: None must be a text"),
        (lambda d: d["annotations"][0]["segments_info"].append("x"), r"image 7 segments_info\[3\]: expected a record"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(id="300"), r"segments_info\[0\]: id: '300' must be"),
        (
            lambda d: d["annotations"][0]["segments_info"][0].update(category_id=[5]),
            r"annotation 300: category_id \[5\]",
        ),
        (lambda d: d["annotations"][0]["segments_info"][0].update(iscrowd="0"), r"annotation 300: iscrowd: '0'"),
    ],
)
def test_panoptic_records_are_checked(tmp_path: Path, edit: Edit, message: str) -> None:
    panoptic_file(tmp_path)
    changed(tmp_path / "panoptic.json", edit)
    with pytest.raises(UserError, match=r"panoptic\.json: .*" + message):
        read_all(tmp_path, PANOPTIC)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["screw, M4", "screw, M5"], ("screw, M4", "screw, M5")),
        (["A", "a"], ("A", "a")),
        (["-stuff", "Wall-stuff"], ("-stuff", "Wall-stuff")),
        ([" Nut, small", "Nut, large "], ("Nut, small", "Nut, large")),
        (["Wall-other-merged", "cabinet, closet"], ("wall", "cabinet")),
    ],
)
def test_names_that_cleaning_would_merge_stay_as_written(tmp_path: Path, written: list[str], read: Any) -> None:
    coco_file(tmp_path)
    changed(tmp_path / "instances.json", lambda d: rename(d, written))
    source = load_source("coco", tmp_path, "val", INSTANCES)
    assert source.categories is not None and source.categories.names == read
    convert("coco", tmp_path / "instances.json", tmp_path / "out", tmp_path / "pictures")
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {mask["category"] for line in lines for mask in line.get("objects", [])} == set(read)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["cat", " cat"], r"categories\[0\] and categories\[1\] are both named 'cat'"),
        (["cat", "  "], r"categories\[1\]: name: '' is empty"),
    ],
)
def test_names_that_nothing_tells_apart(tmp_path: Path, written: list[str], message: str) -> None:
    coco_file(tmp_path)
    changed(tmp_path / "instances.json", lambda d: rename(d, written))
    with pytest.raises(UserError, match=r"instances\.json: " + message):
        load_source("coco", tmp_path, "val", INSTANCES)
