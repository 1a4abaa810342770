import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import noise, real
from PIL import Image

from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import decode, rle_from_segmentation


def square(label: str, top: int, left: int, bottom: int, right: int) -> dict[str, Any]:
    points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"label": label, "points": points}


SHAPES = [
    square("target", 10, 10, 13, 13),  # small, listed first, lies on the ignored one
    square("ignore", 5, 5, 20, 20),
    square("target", 2, 2, 30, 30),
    square("flag", 0, 0, 35, 39),
]


def folder(root: Path, split: str = "train", texts: Any = ("Which one?", "what could it be")) -> Path:
    path = root / "ReasonSeg" / split
    path.mkdir(parents=True, exist_ok=True)
    noise(36, 40).save(path / "a.jpg")
    (path / "a.json").write_text(json.dumps({"text": list(texts), "is_sentence": True, "shapes": SHAPES}))
    noise(9, 12).save(path / "b.png")
    none = {"text": "the key", "is_sentence": False, "shapes": []}
    (path / "b.json").write_bytes(json.dumps({**none, "note": "é"}, ensure_ascii=False).encode("cp1252"))
    return root


def test_polygons_from_large_to_small_with_ignored_pixels(tmp_path: Path) -> None:
    source = load_source("reason", folder(tmp_path), "train", {"folder": "ReasonSeg"})
    sample, bare = source[0], source[1]
    assert sample.masks is not None and sample.ignore is not None and len(source) == 2
    wanted = np.zeros((36, 40), np.uint8)
    wanted[2:31, 2:31], wanted[5:21, 5:21], wanted[10:14, 10:14] = 1, 2, 1
    assert (decode(sample.masks.rles[0]) == (wanted == 1)).all(), "outlines belong to their polygon"
    assert (decode(sample.ignore) == (wanted == 2)).all()
    assert [(p.text, p.instances, p.kind, p.id) for p in sample.phrases] == [
        ("Which one?", (0,), "long", "a:0"),
        ("what could it be", (0,), "long", "a:1"),
    ]
    assert (sample.key, sample.kind, sample.image_id, sample.size) == ("reason/train/a", "long", "a", (36, 40))
    assert bare.phrases[0].instances == () and bare.kind == "short" and bare.ignore is None and len(bare.masks) == 0  # type: ignore[arg-type]


def test_a_sentence_each_in_evaluation_and_explanations(tmp_path: Path) -> None:
    folder(tmp_path, "val")
    (tmp_path / "why.json").write_text(json.dumps([{"image": "a.jpg", "query": "?", "outputs": " It is large. "}]))
    source = load_source("reason", tmp_path, "val", {"folder": "ReasonSeg", "explanations": "why.json"})
    assert [s.key for s in source] == ["reason/val/a-0", "reason/val/a-1", "reason/val/b-0"]
    assert [s.phrases[0].explanation for s in source] == ["It is large.", "It is large.", ""]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"is_sentence": True, "shapes": []}, "key 'text' is missing"),
        ({"text": [], "is_sentence": True, "shapes": []}, "'text' is empty"),
        (
            {"text": ["a"], "is_sentence": True, "shapes": [{"label": "target", "points": [[1, 2, 3]]}]},
            "shapes.0.: points",
        ),
        ({"text": ["a"], "is_sentence": True, "shapes": [{"points": [[1, 2], [3, 4]]}]}, "shapes.0.: key 'label'"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = folder(tmp_path) / "ReasonSeg/train/a.json"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        load_source("reason", tmp_path, "train", {"folder": "ReasonSeg"})[0]


def test_missing_folders_and_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.json there"):
        load_source("reason", tmp_path, "train", {"folder": "ReasonSeg"})
    folder(tmp_path)
    (tmp_path / "ReasonSeg/train/a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.json: image a\.jpg does not exist"):
        load_source("reason", tmp_path, "train", {"folder": "ReasonSeg"})[0]


def test_real_questions_in_the_release_s_layout(tmp_path: Path) -> None:
    """Questions of the test pack, written as ReasonSeg has them, come back with their masks."""
    root, pictures = real("coco_text_ours"), real("coco_mini") / "val2017"
    data = json.loads((real("coco_mini") / "annotations/instances_val2017.json").read_text())
    owned = {a["id"]: a for a in data["annotations"]}
    (tmp_path / "val").mkdir()
    wanted = {}
    for number, row in enumerate(json.loads((root / "reasoning.json").read_text())):
        outlines = [p for i in row["ann_ids"] for p in owned[i]["segmentation"]]
        shapes = [{"label": "target", "points": np.reshape(p, (-1, 2)).tolist()} for p in outlines]
        record = {"text": [row["text"]], "is_sentence": row["is_sentence"], "shapes": shapes}
        (tmp_path / f"val/{number:02d}.json").write_text(json.dumps(record))
        (tmp_path / f"val/{number:02d}.jpg").symlink_to(pictures / row["file_name"])
        with Image.open(pictures / row["file_name"]) as image:
            wanted[f"reason/val/{number:02d}-0"] = decode(rle_from_segmentation(outlines, image.size[::-1], ""))
    source = load_source("reason", tmp_path, "val", {"folder": "."})
    assert len(source) == len(wanted) == 12
    for sample in source:
        assert sample.masks is not None
        mine, theirs = decode(sample.masks.rles[0]) > 0, wanted[sample.key] > 0
        # outlines are inside here and half a pixel off there
        assert (mine & theirs).sum() / (mine | theirs).sum() > 0.8
