"""The JSONL's lines of several phrases or objects: together for training, apart where they are scored."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_stubs import boxes, noise

from xseg.config import TaskSpec
from xseg.data.dataset import Dataset, Preparation
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import area, encode, to_json
from xseg.geometry.views import ViewSizes
from xseg.metrics.iou import PhraseIoU
from xseg.tasks import load_task
from xseg.types import Prediction

OBJECTS: list[dict[str, Any]] = [
    {"segmentation": to_json(encode(mask)), "id": 10 + k} for k, mask in enumerate(boxes(20, 31))
]
PHRASES = [
    {"text": "the right box", "objects": [1], "explanation": "It is there."},
    {"text": "a cat", "objects": []},
    {"text": "the left ones", "objects": [2, 0], "kind": "several"},
]
REFER = {"image": "a.jpg", "objects": OBJECTS, "phrases": PHRASES}
POINT = {"image": "a.jpg", "objects": [OBJECTS[0], {**OBJECTS[1], "crowd": True}, {**OBJECTS[2], "explanation": "So."}]}
NAMED = [{**item, "category": "box"} for item in OBJECTS]
TURNS = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A box."}]


def source(root: Path, *rows: Any, split: str = "val", **options: Any) -> Any:
    noise(20, 31).save(root / "a.jpg")
    (root / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return load_source("jsonl", root, split, {"jsonl": "mine.jsonl", **options})


def test_every_phrase_is_a_sample_with_the_objects_it_names(tmp_path: Path) -> None:
    first, second, third, other = source(tmp_path, REFER, {**REFER, "id": "b", "phrases": PHRASES[:1]})
    assert [s.key for s in (first, second, third, other)] == [
        "jsonl/val/1:0",
        "jsonl/val/1:1",
        "jsonl/val/1:2",
        "jsonl/val/b",
    ]
    assert [[p.text for p in s.phrases] for s in (first, second, third)] == [[p["text"]] for p in PHRASES]
    assert [i.id for i in first.instances] == [11] and first.phrases[0].instances == (0,)
    assert second.instances == () == second.phrases[0].instances and second.phrases[0].kind == "no-target"
    assert [(i.id, i.mask) for i in third.instances] == [(12, 0), (10, 1)] and third.phrases[0].instances == (0, 1)
    masks = boxes(20, 31)
    assert [area(rle) for rle in third.masks.rles] == [masks[2].sum(), masks[0].sum()]
    assert [i.id for i in other.instances] == [10, 11, 12], "a line of one phrase is as it was"
    assert len({s.image_id for s in (first, second, third, other)}) == 1, "intervals are over pictures"


def test_every_object_to_point_at_is_a_sample(tmp_path: Path) -> None:
    first, last = source(tmp_path, POINT)
    assert [(s.key, [(i.id, i.mask) for i in s.instances]) for s in (first, last)] == [
        ("jsonl/val/1:0", [(10, 0)]),
        ("jsonl/val/1:2", [(12, 0)]),
    ]
    assert area(last.masks.rles[0]) == boxes(20, 31)[2].sum() and not last.phrases


@pytest.mark.parametrize(
    ("row", "split", "grouping", "count"),
    [
        (REFER, "train", None, 1),
        (REFER, "train2014", None, 1),
        (REFER, "train", "sentence", 3),
        (REFER, "val", "image", 1),
        (REFER, "val", "object", 3),
        (POINT, "train", None, 1),
        (POINT, "val", "image", 1),
        (POINT, "train", "object", 2),
        # what generic segmentation, prompts by category, captions and conversations read whole
        ({**REFER, "objects": NAMED}, "val", None, 1),
        ({**REFER, "objects": NAMED}, "val", "sentence", 3),
        ({"image": "a.jpg", "objects": NAMED}, "val", None, 1),
        ({"image": "a.jpg", "objects": NAMED}, "val", "sentence", 1),
        ({"image": "a.jpg", "objects": NAMED}, "val", "object", 3),
        ({"image": "a.jpg", "objects": OBJECTS, "caption": "<p>a</p>", "spans": [[0]]}, "val", None, 1),
        ({"image": "a.jpg", "objects": OBJECTS, "turns": TURNS}, "val", None, 1),
    ],
)
def test_how_many_samples_a_line_is(tmp_path: Path, row: Any, split: str, grouping: str | None, count: int) -> None:
    found = source(tmp_path, row, split=split, grouping=grouping)
    assert len(found) == len({s.key for s in found}) == count
    assert all(len(s.phrases) == len(PHRASES) for s in found if "phrases" in row and grouping == "image")
    assert len([found.texts(i) for i in range(count)]) == len([list(found.outlines(i)) for i in range(count)])


def test_texts_are_those_of_the_sample(tmp_path: Path) -> None:
    found = source(tmp_path, REFER, POINT)
    assert [found.texts(i) for i in range(5)] == [
        ("<image>", "the right boxIt is there."),
        ("<image>", "a cat"),
        ("<image>", "the left ones"),
        ("<image>", ""),
        ("<image>", "So."),
    ]


def test_an_unknown_grouping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grouping: 'phrase' must be 'image', 'sentence' or 'object'"):
        source(tmp_path, REFER, grouping="phrase")


@pytest.mark.parametrize(
    ("row", "task", "grouping"), [(REFER, "refer_seg", "sentence"), (POINT, "interactive_seg", "object")]
)
def test_a_model_that_finds_its_answers_can_be_asked(tmp_path: Path, row: Any, task: str, grouping: str) -> None:
    asked = load_task(TaskSpec(name=task, answer="generated"))
    preparation = Preparation(None, ViewSizes(64, 32), train=False)
    together = Dataset(source(tmp_path, row, grouping="image"), asked, preparation)
    with pytest.raises(UserError, match=f"{task}.answer = 'generated' is for one: .* grouping: .*'{grouping}'"):
        together.format(0)
    for found in (source(tmp_path, row), source(tmp_path, row, grouping=grouping)):
        apart = Dataset(found, asked, preparation)
        assert all(apart.format(i).turns[-1].role == "user" for i in range(len(apart)))
        metric = PhraseIoU()
        for i in range(len(apart)):
            metric.update(Prediction(apart.sample(i).key), apart.sample(i))
        assert not any("one conversation" in score.protocol for score in metric.compute())
