"""A clean corpus, and the ways to break it: lint finds every one, and nothing that is not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import boxes, noise, panoptic_file, real

from xseg.config import DataRecipe, TaskSpec
from xseg.data.lint import lint
from xseg.data.lint_records import Fault
from xseg.geometry.masks import encode, to_json

SIZE = (20, 31)
MASKS = boxes(*SIZE)
POLYGON = [[0, 0, 15, 0, 15, 10, 0, 10]]
RLE = to_json(encode(MASKS[1]))
TRAIN, ALL = 12, 18


class Corpus:
    """The data of one folder as Python values; ``write`` puts them on disk."""

    def __init__(self) -> None:
        names = {i: f"COCO_train2014_{i:012d}.jpg" for i in range(1, ALL + 1)}
        self.instances: dict[str, Any] = {
            "images": [{"id": i, "file_name": n, "height": SIZE[0], "width": SIZE[1]} for i, n in names.items()],
            "annotations": [
                {"id": 10 * i + k, "image_id": i, "category_id": 3, "iscrowd": 0, "segmentation": segmentation}
                for i in names
                for k, segmentation in enumerate((POLYGON, RLE))
            ],
            "categories": [{"id": 3, "name": "box"}],
        }
        self.refs = [
            {"ref_id": i, "ann_id": 10 * i, "image_id": i, "category_id": 3, "split": "train" if i <= TRAIN else "val"}
            | {"file_name": n, "sentences": [{"sent_id": i, "sent": f"the box {i}"}]}
            for i, n in names.items()
        ]
        objects = [
            {"segmentation": POLYGON, "category": "box", "prompts": {"point": [4, 4]}},
            {"segmentation": RLE, "category": "box"},
        ]
        self.lines: list[Any] = [
            {
                "id": f"line-{i}",
                "image": f"images/{names[i]}",
                "size": list(SIZE),
                "objects": json.loads(json.dumps(objects)),
            }
            | (
                {"caption": "<p>a box</p> and <p>another</p>", "spans": [[0], [1]]}
                if i % 2
                else {"phrases": [{"text": "both", "objects": [0, 1]}, {"text": "a cat", "objects": []}]}
            )
            for i in range(1, 9)
        ]
        self.talk = [
            {"id": i, "image": names[i]}
            | {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}]}
            for i in range(1, 7)
        ]
        self.files = {n: noise(*SIZE, seed=i) for i, n in names.items()}
        self.damage: list[Callable[[Path], object]] = []

    def write(self, root: Path) -> None:
        (root / "images").mkdir()
        for name, image in self.files.items():
            image.save(root / "images" / name)
        for name in ("instances", "refs", "talk"):
            (root / f"{name}.json").write_text(json.dumps(getattr(self, name)))
        lines = [line if isinstance(line, str) else json.dumps(line) for line in self.lines]
        (root / "lines.jsonl").write_text("\n".join(lines))
        for spoil in self.damage:
            spoil(root)


TASKS = {"llava": "conversation", "pope": "conversation", "frames": "interactive_seg"}
TASKS |= dict.fromkeys(("coco", "semantic"), "generic_seg")
REFER = {"images": "images", "refs": "refs.json", "instances": "instances.json"}


def recipe(source: str, split: str, **options: Any) -> DataRecipe:
    return DataRecipe(source=source, split=split, options=options, task=TaskSpec(name=TASKS.get(source, "refer_seg")))


RECIPES = {
    "refcoco": recipe("refer", "train", **REFER, name="refcoco"),
    "refcocog": recipe("refer", "val", **REFER, name="refcocog"),
    "lines": recipe("jsonl", "train", jsonl="lines.jsonl"),
    "talk": recipe("llava", "train", json="talk.json", images="images"),
}


def found(root: Path, workers: int = 1) -> list[Fault]:
    reports, leaks = lint(RECIPES, root, workers)
    return [fault for report in reports for fault in report.faults] + leaks


# Each way of breaking takes the corpus and the number of an image (or line, or conversation) that nothing else breaks,
# and returns the kind of fault and a piece of its text that names the record.


def missing_image(c: Corpus, i: int) -> tuple[str, str]:
    del c.files[f"COCO_train2014_{i:012d}.jpg"]
    return "image missing", f"{i:012d}.jpg"


def cut_image(c: Corpus, i: int) -> tuple[str, str]:
    name = f"images/COCO_train2014_{i:012d}.jpg"
    c.damage.append(lambda root: os.truncate(root / name, 300))
    return "image unreadable", f"{i:012d}.jpg"


def other_image(c: Corpus, i: int) -> tuple[str, str]:
    c.files[f"COCO_train2014_{i:012d}.jpg"] = noise(31, 20)
    return "image size", f"{i:012d}.jpg"


def image_id_twice(c: Corpus, i: int) -> tuple[str, str]:
    c.instances["images"].append({**c.instances["images"][i - 1], "file_name": f"again-{i}.png"})
    c.files[f"again-{i}.png"] = noise(*SIZE)
    return "duplicate id", f"id {i} is there twice"


def annotation(c: Corpus, i: int, k: int = 0, **change: Any) -> str:
    c.instances["annotations"][2 * (i - 1) + k].update(change)
    return f"annotations[{2 * (i - 1) + k}]"


def annotation_id_twice(c: Corpus, i: int) -> tuple[str, str]:
    return "duplicate id", annotation(c, i, 1, id=10 * i)


def lost_category(c: Corpus, i: int) -> tuple[str, str]:
    return "unknown category", annotation(c, i, category_id=99)


def lost_image(c: Corpus, i: int) -> tuple[str, str]:
    return "unknown image", annotation(c, i, 1, image_id=777)


def empty_mask(c: Corpus, i: int) -> tuple[str, str]:
    return "mask empty", annotation(c, i, segmentation=[[3, 3, 4, 4]])


def outline_outside(c: Corpus, i: int) -> tuple[str, str]:
    return "polygon outside", annotation(c, i, segmentation=[[0, 0, 90, 0, 15, 10]])


def mask_of_another_size(c: Corpus, i: int) -> tuple[str, str]:
    return "mask damaged", annotation(c, i, 1, segmentation={"size": [31, 20], "counts": RLE["counts"]})


def lost_annotation(c: Corpus, i: int) -> tuple[str, str]:
    c.refs[i - 1]["ann_id"] = 5555
    return "unknown annotation", f"(ref_id {i})"


def annotation_elsewhere(c: Corpus, i: int) -> tuple[str, str]:
    c.refs[i - 1]["ann_id"] = 10 * (i % ALL + 1)
    return "annotation of another image", f"(ref_id {i})"


def no_words(c: Corpus, i: int) -> tuple[str, str]:
    c.refs[i - 1]["sentences"] = [{"sent_id": i, "sent": " "}]
    return "text empty", f"(ref_id {i})"


def sentence_without_its_record(c: Corpus, i: int) -> tuple[str, str]:
    c.refs[i - 1]["sentences"] = [f"the box {i}"]
    return "text empty", f"(ref_id {i})"


def reference_id_twice(c: Corpus, i: int) -> tuple[str, str]:
    c.refs.append({**c.refs[i - 1], "sentences": [{"sent_id": 900, "sent": "again"}]})
    return "duplicate id", f"ref_id {i} is there twice"


def spans_without_masks(c: Corpus, i: int) -> tuple[str, str]:
    line = c.lines[2 * (i % 4)]
    line["spans"][1] = []
    return "spans and masks", line["id"]


def whole_picture(c: Corpus, i: int) -> tuple[str, str]:
    line = c.lines[i % 8]
    line["objects"][1]["segmentation"] = {"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}
    return "mask oversize", line["id"]


def line_id_twice(c: Corpus, i: int) -> tuple[str, str]:
    c.lines.append({**c.lines[i % 8]})
    return "duplicate id", f"{c.lines[i % 8]['id']}: two samples"


def no_json(c: Corpus, i: int) -> tuple[str, str]:
    c.lines[i % 8] = '{"image": '
    return "record", f"line {i % 8 + 1}: not a JSON object"


def point_beside(c: Corpus, i: int) -> tuple[str, str]:
    c.lines[i % 8]["objects"][0]["prompts"]["point"] = [30, 19]
    return "prompt", c.lines[i % 8]["id"]


def lost_object(c: Corpus, i: int) -> tuple[str, str]:
    line = c.lines[2 * (i % 4) + 1]
    line["phrases"][0]["objects"] = [0, 2]
    return "record", f"line {2 * (i % 4) + 2}: phrases[0]: objects [0, 2]"


def image_token_without_image(c: Corpus, i: int) -> tuple[str, str]:
    del c.talk[i % 6]["image"]
    return "conversation", f"conversation {i % 6}: "


def silent_answer(c: Corpus, i: int) -> tuple[str, str]:
    c.talk[i % 6]["conversations"][1]["value"] = ""
    return "text empty", f"conversation {i % 6}: turn 1"


def leak(c: Corpus, i: int) -> tuple[str, str]:
    c.refs.append({**c.refs[i - 1], "ref_id": 800, "split": "val", "sentences": [{"sent_id": 800, "sent": "seen"}]})
    where = "train" if i <= TRAIN else "val"
    if where == "val":  # an image of the held-out part that the training part gets too
        c.refs[-1]["split"] = "train"
    return "leak", f"{i}-"


WAYS = [
    missing_image, cut_image, other_image, image_id_twice, annotation_id_twice, lost_category, lost_image, empty_mask,
    outline_outside, mask_of_another_size, lost_annotation, annotation_elsewhere, no_words, reference_id_twice,
    spans_without_masks, whole_picture, line_id_twice, no_json, point_beside, lost_object, image_token_without_image,
    silent_answer, sentence_without_its_record, leak,
]  # fmt: skip


def test_a_clean_corpus_has_no_fault(tmp_path: Path) -> None:
    Corpus().write(tmp_path)
    reports, leaks = lint(RECIPES, tmp_path)
    assert [(r.recipe, r.samples, r.faults) for r in reports] == [
        ("refcoco", 12, []),
        ("refcocog", 6, []),
        ("lines", 8, []),
        ("talk", 6, []),
    ]
    assert leaks == []


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_every_way_to_break_it_is_found_and_nothing_else(tmp_path: Path, way: Any, seed: int) -> None:
    corpus = Corpus()
    kind, place = way(corpus, int(np.random.default_rng(seed).integers(1, ALL + 1)))
    corpus.write(tmp_path)
    faults = found(tmp_path)
    assert any(f.kind == kind and place in f.text for f in faults), faults
    assert {f.kind for f in faults} == {kind}, faults


def test_all_at_once_in_a_seeded_corpus(tmp_path: Path) -> None:
    corpus = Corpus()
    numbers = np.random.default_rng(11).permutation(np.arange(1, ALL + 1)).tolist()
    together = [way for way in WAYS if way is not leak]
    lines = {spans_without_masks: 0, whole_picture: 2, line_id_twice: 6, no_json: 4, point_beside: 5, lost_object: 1}
    wanted = [way(corpus, lines[way] if way in lines else numbers.pop()) for way in together]
    corpus.write(tmp_path)
    faults = found(tmp_path)
    assert len(wanted) >= 20
    for kind, place in wanted:
        assert any(f.kind == kind and place in f.text for f in faults), (kind, place, faults)
    for fault in faults:
        assert any(fault.kind == kind and place in fault.text for kind, place in wanted), fault


def test_segments_that_a_panoptic_record_does_not_list(tmp_path: Path) -> None:
    data = panoptic_file(tmp_path)
    options = {"panoptic_json": "panoptic.json", "panoptic_dir": "panoptic"}
    noise(*SIZE).save(tmp_path / data["images"][0]["file_name"])
    whole = DataRecipe(source="coco", options={"images": ".", **options}, task=TaskSpec(name="generic_seg"))
    kinds = {f.kind for f in lint({"p": whole}, tmp_path)[0][0].faults}
    assert "unknown annotation" not in kinds
    segments = data["annotations"][0]["segments_info"]
    gone = segments.pop(1)
    (tmp_path / "panoptic.json").write_text(json.dumps(data))
    [report], _ = lint({"p": whole}, tmp_path)
    assert [str(gone["id"]) in f.text for f in report.faults if f.kind == "unknown annotation"] == [True]


def test_a_picture_of_reason_seg_without_its_target(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    outline = [[0, 0], [15, 0], [15, 10], [0, 10]]
    for name, label in (("good", "target"), ("bare", "ignore")):
        noise(*SIZE).save(tmp_path / f"val/{name}.jpg")
        record = {"text": ["What?"], "is_sentence": True, "shapes": [{"label": label, "points": outline}]}
        (tmp_path / f"val/{name}.json").write_text(json.dumps(record))
    recipe = DataRecipe(source="reason", options={"folder": "."}, task=TaskSpec(name="reason_seg"), split="val")
    [report], _ = lint({"r": recipe}, tmp_path)
    assert [(f.kind, "bare" in f.text) for f in report.faults] == [("mask empty", True)]


def test_workers_change_nothing(tmp_path: Path) -> None:
    corpus = Corpus()
    corpus.lines += [{**corpus.lines[i % 8], "id": f"more-{i}"} for i in range(60)]
    empty_mask(corpus, 3)
    point_beside(corpus, 3)
    corpus.write(tmp_path)
    assert found(tmp_path) == found(tmp_path, workers=2) != []


REAL: dict[str, tuple[DataRecipe, set[str]]] = {
    "coco_mini": (
        recipe("coco", "val", images="coco_mini/val2017", instances="coco_mini/annotations/instances_val2017.json"),
        set(),
    ),
    "coco_refexp": (
        recipe(
            "refer",
            "val",
            images="coco_refexp/images",
            refs="coco_refexp/refs.json",
            instances="coco_refexp/instances.json",
        ),
        set(),
    ),
    "coco_text_ours": (
        recipe(
            "refer",
            "val",
            images="coco_mini/val2017",
            refs="coco_text_ours/refs.json",
            instances="coco_mini/annotations/instances_val2017.json",
        ),
        set(),
    ),
    "coco_panoptic": (
        recipe(
            "coco",
            "val",
            images="coco_panoptic/input_images",
            panoptic_json="coco_panoptic/panoptic_examples.json",
            panoptic_dir="coco_panoptic/panoptic_examples",
        ),
        set(),
    ),
    "lvis": (recipe("coco", "val", images="lvis/images/{id:012d}.jpg", instances="lvis/lvis_subset.json"), set()),
    "ade20k": (
        recipe(
            "semantic",
            "val",
            images="ade20k/images",
            labels="ade20k/annotations",
            names="ade20k/objectInfo150.txt",
            first=1,
        ),
        set(),
    ),
    "semseg_misc": (
        recipe(
            "semantic",
            "val",
            images="semseg_misc/cityscapes/leftImg8bit/val",
            labels="semseg_misc/cityscapes/gtFine/val",
            suffixes=["_leftImg8bit.png", "_gtFine_labelTrainIds.png"],
            names=[f"class {i}" for i in range(19)],
        ),
        set(),
    ),
    "davis16": (
        recipe("frames", "val", frames="davis16/JPEGImages/480p", masks="davis16/Annotations/480p", binary=True),
        set(),
    ),
    # a mask of 853 pixels on a frame of 854: a true fault of that clip
    "vos_multi": (
        recipe("frames", "val", frames="vos_multi/cutie/images", masks="vos_multi/cutie/masks"),
        {"image size"},
    ),
    "pope": (recipe("pope", "val", json="pope/pope_subset.json", images="pope/images"), set()),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name: str) -> None:
    root = real(".")
    found, kinds = REAL[name]
    (report,), _ = lint({name: found}, root)
    assert report.samples > 0 and {f.kind for f in report.faults} == kinds, report.faults
    if name == "vos_multi":
        assert len(report.faults) == 1 and "judo/00005" in report.faults[0].text
