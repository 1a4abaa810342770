"""Label maps and frame folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import noise, real
from PIL import Image

from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import decode, dense

MAP = np.array([[0, 1, 1, 255], [3, 3, 0, 2]])


def maps(root: Path, mode: str = "L") -> Path:
    (root / "images/a").mkdir(parents=True)
    (root / "labels/a").mkdir(parents=True)
    noise(2, 4).save(root / "images/a/x.jpg")
    kinds: dict[str, Any] = {"L": np.uint8, "I;16": np.uint16}
    Image.fromarray(MAP.astype(kinds[mode])).save(root / "labels/a/x.png")
    (root / "names.txt").write_text("Idx\tRatio\tName\n1\t0.5\twall\n2\t0.2\tbuilding, edifice\n3\t0.1\tfloor-wood\n")
    return root


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_numbers_are_classes(tmp_path: Path, mode: str) -> None:
    options = {"images": "images", "labels": "labels", "names": "names.txt", "first": 1, "name": "ade"}
    source = load_source("semantic", maps(tmp_path, mode), "val", options)
    (sample,) = source
    assert source.categories is not None and source.categories.names == ("wall", "building", "floor wood")
    assert (sample.key, sample.image_id, sample.size) == ("ade/val/a/x", "a/x", (2, 4))
    assert sample.images == (tmp_path / "images/a/x.jpg",)
    assert [(i.category, i.id) for i in sample.instances] == [(0, 1), (1, 2), (2, 3)]
    assert sample.masks is not None
    assert (dense(sample.masks) == np.stack([c == MAP for c in (1, 2, 3)])).all(), "0 and 255 belong to nothing"


def test_names_in_the_recipe_and_numbers_from_zero(tmp_path: Path) -> None:
    options = {"images": "images", "labels": "labels", "names": ["road", "sky"]}
    (sample,) = load_source("semantic", maps(tmp_path), "val", options)
    assert [(i.category, i.id) for i in sample.instances] == [(0, 0), (1, 1)]


def test_wrong_folders_and_pictures(tmp_path: Path) -> None:
    options = {"images": "images", "labels": "labels", "names": "names.txt"}
    maps(tmp_path)
    with pytest.raises(UserError, match=r"no \*_x\.png there"):
        load_source("semantic", tmp_path, "val", {**options, "suffixes": ["", "_x.png"]})
    with pytest.raises(UserError, match=r"lost\.txt: the list of names cannot be read"):
        load_source("semantic", tmp_path, "val", {**options, "names": "lost.txt"})
    noise(2, 4).save(tmp_path / "labels/a/x.png")
    with pytest.raises(UserError, match=r"x\.png: a label map has one channel .* mode RGB"):
        load_source("semantic", tmp_path, "val", options)[0]
    (tmp_path / "labels/a/x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"x\.png: the label map cannot be read"):
        load_source("semantic", tmp_path, "val", options)[0]


def clip(root: Path) -> Path:
    (root / "JPEG/run").mkdir(parents=True)
    (root / "PNG/run").mkdir(parents=True)
    for frame in range(3):
        noise(2, 4, frame).save(root / f"JPEG/run/{frame:05d}.jpg")
    for frame in (0, 2):
        image = Image.fromarray(np.roll(MAP, frame).astype(np.uint8))
        image.putpalette(list(range(256)) * 3)
        image.save(root / f"PNG/run/{frame:05d}.png")
    return root


def test_frames_keep_their_objects_ids(tmp_path: Path) -> None:
    source = load_source("frames", clip(tmp_path), "val", {"frames": "JPEG", "masks": "PNG", "name": "davis"})
    first, last = source
    assert [s.key for s in source] == ["davis/val/run/00000", "davis/val/run/00002"]
    assert first.images == (tmp_path / "JPEG/run/00000.jpg",) and first.kind == "run"
    assert [i.id for i in first.instances] == [i.id for i in last.instances] == [1, 2, 3]
    assert first.masks is not None and (dense(first.masks)[1] == (MAP == 2)).all()
    assert first.ignore is not None and (decode(first.ignore) == (MAP == 255)).all()
    (one, _) = load_source("frames", tmp_path, "val", {"frames": "JPEG", "masks": "PNG", "binary": True})
    assert one.masks is not None and (dense(one.masks)[0] == (MAP > 0)).all() and len(one.masks) == 1
    for options in ({"clips": ["walk"]}, {"masks": "no"}):
        with pytest.raises(UserError, match="no folder of masks for"):
            load_source("frames", tmp_path, "val", {"frames": "JPEG", "masks": "PNG", **options})


def test_real_ade20k() -> None:
    options = {"images": "images", "labels": "annotations", "names": "objectInfo150.txt", "first": 1}
    source = load_source("semantic", real("ade20k"), "val", options)
    assert source.categories is not None and len(source.categories.names) == 150 and len(source) == 3
    assert source.categories.names[:4] == ("wall", "building", "sky", "floor")
    for sample in source:
        assert sample.masks is not None and sample.images[0].is_file() and len(sample.instances) > 3  # type: ignore[union-attr]
        assert dense(sample.masks).sum(0).max() == 1


@pytest.mark.parametrize(
    ("images", "labels", "suffixes", "names", "first"),
    [
        ("loveda/img_dir", "loveda/ann_dir", {}, 7, 1),
        ("potsdam/img_dir", "potsdam/ann_dir", {}, 6, 0),
        ("vaihingen/img_dir", "vaihingen/ann_dir", {}, 6, 0),
        ("lip/train_images", "lip/train_segmentations", {}, 20, 0),
        (
            "cityscapes/leftImg8bit/val",
            "cityscapes/gtFine/val",
            {"suffixes": ["_leftImg8bit.png", "_gtFine_labelTrainIds.png"]},
            19,
            0,
        ),
    ],
)
def test_real_label_maps_of_other_sets(
    images: str, labels: str, suffixes: dict[str, Any], names: int, first: int
) -> None:
    options = {"images": images, "labels": labels, "names": [f"class {i}" for i in range(names)], "first": first}
    source = load_source("semantic", real("semseg_misc"), "val", {**options, **suffixes})
    for sample in source:
        with Image.open(sample.images[0]) as image:  # type: ignore[arg-type]
            assert image.size[::-1] == sample.size
        assert len(sample.instances) >= 2


def test_real_davis() -> None:
    options = {"frames": "JPEGImages/480p", "masks": "Annotations/480p", "binary": True, "name": "davis16"}
    source = load_source("frames", real("davis16"), "val", options)
    assert len(source) == 160 and len({s.kind for s in source}) == 10
    for sample in list(source)[::40]:
        assert sample.images[0].is_file() and len(sample.instances) == 1  # type: ignore[union-attr]


def test_real_clips_with_several_objects() -> None:
    options = {"frames": "cutie/images", "masks": "cutie/masks"}
    source = load_source("frames", real("vos_multi"), "val", options)
    found = {s.key: [i.id for i in s.instances] for s in source}
    assert found["frames/val/bike/00000"] == [1, 2] and found["frames/val/judo/00013"][-1] == 4 and len(found) == 5
