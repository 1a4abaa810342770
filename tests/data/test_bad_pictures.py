"""Pictures that are not what their annotations say, or not what can be read: told by convert and by lint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import coco_file, noise, panoptic_file
from PIL import Image

from xseg.config import DataRecipe, TaskSpec
from xseg.data.convert import convert
from xseg.data.lint import lint
from xseg.errors import UserError

SHAPE = {"label": "car", "points": [[0, 0], [9, 0], [9, 9]], "shape_type": "polygon"}


def refused(layout: str, source: Path, images: Path | None, message: str) -> None:
    before = set(source.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        convert(layout, source, source.parent / "out", images)
    assert set(source.parent.rglob("*")) == before


def labelme(root: Path, **stated: Any) -> Path:
    (root / "mine").mkdir()
    noise(20, 31).save(root / "mine/a.png")
    (root / "mine/a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": [SHAPE], **stated}))
    return root / "mine"


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (3, 999, r"a\.json: image .*a\.png is \[20, 31\] \(height, width\), its annotation says \[3, 999\].*the size$"),
        (31, 20, r"a\.json: image .*a\.png is \[20, 31\].*says \[31, 20\].*EXIF rotation"),
        ("20", 31, r"a\.json: imageHeight: '20' must be a whole number"),
        (20, None, r"a\.json: imageWidth: None must be a whole number"),
    ],
)
def test_labelme_states_the_size_of_its_picture(tmp_path: Path, height: Any, width: Any, message: str) -> None:
    refused("labelme", labelme(tmp_path, imageHeight=height, imageWidth=width), None, message)


@pytest.mark.parametrize("stated", [{}, {"imageHeight": None, "imageWidth": None}])
def test_labelme_need_not_state_a_size(tmp_path: Path, stated: dict[str, None]) -> None:
    assert convert("labelme", labelme(tmp_path, **stated), tmp_path / "out") == 1


@pytest.mark.parametrize("file", ["instances.json", "panoptic.json"])
def test_coco_states_the_size_of_its_pictures(tmp_path: Path, file: str) -> None:
    (coco_file if file == "instances.json" else panoptic_file)(tmp_path)
    path, pictures = tmp_path / file, tmp_path / "pictures"
    refused("coco", path, tmp_path / "nope", r"nope: no such folder; .*--images DIR")
    data = json.loads(path.read_text())
    right = data["images"][0].copy()
    for sides, message in (
        ({"height": 4_000_000}, r"image 7: image .* is \[20, 31\] .* says \[4000000, 31\]"),
        ({"height": 31, "width": 20}, r"image 7: .*EXIF rotation"),
        ({"file_name": "gone.png"}, r"image 7: image .*gone\.png does not exist"),
    ):
        data["images"][0] = {**right, **sides}
        path.write_text(json.dumps(data))
        refused("coco", path, pictures, message)


def test_lint_and_convert_tell_of_a_deep_picture(tmp_path: Path) -> None:
    coco_file(tmp_path)
    deep = Image.fromarray(np.full((20, 31), 30000, np.uint16))
    name = json.loads((tmp_path / "instances.json").read_text())["images"][0]["file_name"]
    deep.save(tmp_path / "pictures" / name)
    options = {"images": "pictures", "instances": "instances.json"}
    recipe = DataRecipe(source="coco", options=options, task=TaskSpec(name="generic_seg"))
    ((report,), _) = lint({"mine": recipe}, tmp_path)
    (fault,) = [f for f in report.faults if f.kind == "image unreadable"]
    assert name in fault.text and "16-bit picture" in fault.text and "store it with 8 bits a channel" in fault.text
    refused("coco", tmp_path / "instances.json", tmp_path / "pictures", r"16-bit picture")


def test_lint_goes_on_after_a_size_that_no_picture_has(tmp_path: Path) -> None:
    data = coco_file(tmp_path)
    data["images"][0]["height"] = -4
    (tmp_path / "instances.json").write_text(json.dumps(data))
    options = {"images": "pictures", "instances": "instances.json"}
    recipe = DataRecipe(source="coco", options=options, task=TaskSpec(name="generic_seg"))
    ((report,), _) = lint({"mine": recipe}, tmp_path)
    assert len(report.faults) > 1 and any(
        "[-4, 31] (height, width): both are 1 or more" in f.text for f in report.faults
    )
