import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import boxes, noise, real

from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import decode, dense, encode, rle_from_segmentation, to_json

MASKS = boxes(20, 31)
RLES = [to_json(encode(m)) for m in MASKS]
CAPTION = '"A Dog sits beside two cats on the grass."'


def psg(**changes: Any) -> list[dict[str, Any]]:
    groundings = {
        "two cats": {"token_positives": [18, 26], "rle_masks": RLES[1:]},
        "A Dog": {"token_positives": [0, 5], "rle_masks": RLES[:1]},
        "cats on": {"token_positives": [22, 29], "rle_masks": RLES[2:]},
    }
    return [{"image_id": 7, "file_name": "7.jpg", "caption": CAPTION, "groundings": groundings, **changes}]


def source(root: Path, data: Any, **options: str) -> Any:
    (root / "gcg.json").write_text(json.dumps(data))
    return load_source("gcg", root, "train", {"json": "gcg.json", "images": "pictures", **options})


def test_granular_captions_of_granddf_and_openpsg(tmp_path: Path) -> None:
    assert CAPTION[1:][0:5] == "A Dog" and CAPTION[1:][18:26] == "two cats", "places count behind the quotation mark"
    sample = source(tmp_path, psg())[0]
    assert [t.text for t in sample.turns] == ["<p>a dog</p> sits beside <p>two cats</p> on the grass."]
    assert [(p.text, p.instances) for p in sample.phrases] == [("a dog", (0,)), ("two cats", (1, 2))]
    assert sample.masks is not None and (dense(sample.masks) == MASKS).all()
    assert sample.images == (tmp_path / "pictures/7.jpg",) and sample.size == (20, 31)
    assert (sample.key, sample.image_id) == ("gcg/train/000000", "7")


def test_refcocog_s_sentences_are_found_as_words_of_the_caption(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    noise(20, 31).save(tmp_path / "pictures/COCO_train2014_000000000007.jpg")
    refs = [
        {"sentence": "the grass", "segmentation": [[0, 10, 10, 10, 10, 20, 0, 20]]},
        {"sentence": "A DOG", "segmentation": [[0, 0, 15, 0, 15, 10, 0, 10]]},
        {"sentence": "a zebra", "segmentation": [[0, 0, 3, 0, 3, 3]]},
    ]
    record = {"img_file_name": "COCO_train2014_000000000007.jpg", "caption": "A dog, a dog on the grass", "refs": refs}
    sample = source(tmp_path, [{"7": record}])[0]
    assert sample.turns[0].text == "<p>a dog</p>, a dog on <p>the grass</p>"
    assert [p.text for p in sample.phrases] == ["a dog", "the grass"] and sample.masks is not None
    found = dense(sample.masks)
    assert found[0, 5, 5] and found[1, 15, 5] and not found[0, 15, 5] and len(found) == 2
    twice = {**record, "refs": [refs[1], refs[1]]}
    assert source(tmp_path, [{"7": twice}])[0].turns[0].text == "<p>a dog</p>, <p>a dog</p> on the grass"


def test_flickr_rows_of_one_span_are_one_phrase(tmp_path: Path) -> None:
    images = [
        {"id": 3, "file_name": "3.jpg", "caption": "Two men and a boat."},
        {"id": 4, "file_name": "4.jpg", "caption": "A big fish"},
        {"id": 5, "file_name": "5.jpg", "caption": "Two words"},
    ]
    rows = [
        {"image_id": 3, "tokens_positive": [[12, 18]], "sam_mask": RLES[2]},
        {"image_id": 3, "tokens_positive": [[0, 7]], "sam_mask": RLES[0]},
        {"image_id": 3, "tokens_positive": [[0, 7]], "sam_mask": RLES[1]},
        {"image_id": 4, "tokens_positive": [[0, 10]], "sam_mask": RLES[1]},
    ]
    found = source(tmp_path, {"images": images, "annotations": rows})
    assert [t.text for s in found for t in s.turns] == ["<p>two men</p> and <p>a boat</p>.", "<p>a big fish</p>"]
    assert [p.instances for p in found[0].phrases] == [(0, 1), (2,)]
    with pytest.raises(UserError, match="image_id 9, which 'images' does not list"):
        source(tmp_path, {"images": images, "annotations": [{**rows[0], "image_id": 9}]})


def val_files(root: Path, labels: list[str]) -> dict[str, str]:
    row = {"image_id": "sa_1", "id": 1, "caption": "A dog and a cat.", "labels": labels}
    (root / "captions.json").write_text(json.dumps({"images": [{"id": "sa_1"}], "annotations": [row]}))
    masks = [{"image_id": "sa_1", "id": i, "category_id": 1, "segmentation": rle} for i, rle in enumerate(RLES[:2])]
    (root / "masks.json").write_text(json.dumps({"annotations": masks}))
    return {"captions": "captions.json", "masks": "masks.json", "images": "pictures", "name": "granddf"}


def test_val_captions_with_their_own_mask_file(tmp_path: Path) -> None:
    sample = load_source("gcg", tmp_path, "val", val_files(tmp_path, ["the cat", "a dog"]))[0]
    assert sample.turns[0].text == "<p>a dog</p> and a cat."
    assert [(p.text, p.instances) for p in sample.phrases] == [("a dog", (0,)), ("the cat", (1,))]
    assert sample.masks is not None and (dense(sample.masks) == MASKS[[1, 0]]).all(), (
        "the k-th mask is the k-th label's"
    )
    assert sample.images == (tmp_path / "pictures/sa_1.jpg",) and sample.key == "granddf/val/000000"
    with pytest.raises(UserError, match=r"annotations\[0\]: 1 labels, but .* has 2 masks of image 'sa_1'"):
        load_source("gcg", tmp_path, "val", val_files(tmp_path, ["a dog"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groundings": {"x": {"token_positives": [3, 99], "rle_masks": RLES}}},
            "'x': characters 3 to 99 of a caption",
        ),
        ({"groundings": {"x": {"token_positives": [3], "rle_masks": RLES}}}, r"'x': \[3\] must be \[start, end\]"),
        ({"groundings": {"x": {"token_positives": [1, 6]}}}, "'x': key 'rle_masks' is missing"),
        ({"groundings": []}, "'groundings' is a list"),
        ({"caption": None}, "caption: None must be a text"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"gcg\.json: record 0: {message}"):
        source(tmp_path, psg(**changes))[0]
    with pytest.raises(UserError, match="either the option 'json', or 'captions' and 'masks'"):
        load_source("gcg", tmp_path, "val", {"images": "pictures", "captions": "captions.json"})


def test_real_captions_in_the_release_s_layout(tmp_path: Path) -> None:
    """The grounded captions of the test pack, written as OpenPSG-GCG has them, come back as they were tagged."""
    ours = json.loads((real("coco_text_ours") / "gcg.json").read_text())
    data = json.loads((real("coco_mini") / "annotations/instances_val2017.json").read_text())
    owned = {a["id"]: a for a in data["annotations"]}
    sizes = {i["id"]: (i["height"], i["width"]) for i in data["images"]}
    rows, masks = [], []
    for row in ours:
        groundings, size = {}, sizes[row["image_id"]]
        for group in row["groups"]:
            start = row["caption"].index(group["phrase"])
            rles = [rle_from_segmentation(owned[i]["segmentation"], size, "") for i in group["ann_ids"]]
            masks.append(rles)
            place = [start, start + len(group["phrase"])]
            groundings[group["phrase"]] = {"token_positives": place, "rle_masks": [to_json(r) for r in rles]}
        rows.append({"file_name": row["file_name"], "caption": row["caption"], "groundings": groundings})
    found = source(tmp_path, rows)
    assert len(found) == 8 and [s.turns[0].text for s in found] == [row["tagged"].lower() for row in ours]
    spans = [(s, p) for s in found for p in s.phrases]
    assert max(len(p.instances) for _, p in spans) == 5
    by_text = [[decode(s.masks.rles[s.instances[i].mask]) for i in p.instances] for s, p in spans]
    for mine, theirs in zip(by_text, masks, strict=True):
        assert all(np.array_equal(a, decode(b)) for a, b in zip(mine, theirs, strict=True))
