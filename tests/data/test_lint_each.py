"""What lint says about single things: words and tasks, options and empty files."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_stubs import coco_file, noise

from xseg.config import DataRecipe, TaskSpec
from xseg.data.lint import Report, identity, lint

POLYGON = [[0, 0, 15, 0, 15, 10, 0, 10]]
NAMED = {"segmentation": POLYGON, "category": "box"}
TURNS = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A box."}, {"role": "user", "text": "Why?"}]


def report(root: Path, source: str, task: Any, split: str = "train", **options: Any) -> Report:
    spec = TaskSpec(**({"name": task} if isinstance(task, str) else task))
    [found], _ = lint({"mine": DataRecipe(source=source, options=options, task=spec, split=split)}, root)
    return found


def lines(root: Path, *rows: Any) -> None:
    noise(20, 31).save(root / "a.jpg")
    (root / "a.jsonl").write_text("\n".join(json.dumps({"image": "a.jpg", **row}) for row in rows))


def coco(root: Path, **change: Any) -> None:
    data = coco_file(root)
    data["annotations"] = data["annotations"][:2]
    (root / "instances.json").write_text(json.dumps({**data, **change}))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("row", "task", "kind", "message"),
    [
        ({"objects": [{"segmentation": POLYGON}]}, "generic_seg", "refused", "1: task generic_seg needs a source with"),
        ({"objects": [NAMED]}, "refer_seg", "refused", "1: task refer_seg needs phrases"),
        ({"objects": [NAMED], "turns": TURNS}, "conversation", "no answer", "1: its last turn is the user's"),
        ({"objects": [{**NAMED, "category": "a <p>"}]}, "generic_seg", "record", "'a <p>' holds <p>"),
        ({"objects": [{**NAMED, "category": "<SEG>"}]}, "generic_seg", "record", "'<SEG>' holds <SEG>"),
        ({"objects": [{**NAMED, "category": ""}]}, "generic_seg", "record", "category: '' has no words"),
        (
            {"objects": [NAMED], "phrases": [{"text": "<image>", "objects": [0]}]},
            "refer_seg",
            "record",
            "holds <image>",
        ),
        ({"objects": [NAMED], "phrases": [{"text": "a \x02", "objects": [0]}]}, "refer_seg", "refused", "U+0002"),
        ({"objects": [{**NAMED, "prompts": {"point": [500, 500]}}]}, "interactive_seg", "record", "no pixel of it"),
    ],
)
def test_what_training_refuses_is_a_fault(
    tmp_path: Path, row: Any, task: str, kind: str, message: str, split: str
) -> None:
    lines(tmp_path, row)
    found = report(tmp_path, "jsonl", task, split, jsonl="a.jsonl").faults
    assert [(f.kind, message in f.text) for f in found] == [(kind, True)], found


def test_the_wrong_task_is_told_once(tmp_path: Path) -> None:
    lines(tmp_path, *[{"objects": [NAMED]}] * 40)
    assert [f.kind for f in report(tmp_path, "jsonl", "refer_seg", jsonl="a.jsonl").faults] == ["refused"]
    [fault] = report(tmp_path, "jsonl", {"name": "refer_seg", "rejekt": 1}, jsonl="a.jsonl").faults
    assert fault.kind == "task" and "did you mean 'reject'" in fault.text


@pytest.mark.parametrize(("name", "message"), [("a <region>", "holds <region>"), ("", "name"), ("a <p>", "holds <p>")])
def test_a_name_that_cannot_be_asked_for(tmp_path: Path, name: str, message: str) -> None:
    coco(tmp_path, categories=[{"id": 5, "name": "box"}, {"id": 2, "name": name}])
    [fault] = report(tmp_path, "coco", "generic_seg", images="pictures", instances="instances.json").faults
    assert message in fault.text, fault


def test_phrases_of_other_formats_with_markers(tmp_path: Path) -> None:
    coco(tmp_path)
    sentences = [{"sent_id": i, "sent": text} for i, text in enumerate(("a box", "the <region>", "a </p>"))]
    ref = {"ref_id": 1, "ann_id": 70, "image_id": 7, "split": "train", "sentences": sentences}
    (tmp_path / "refs.json").write_text(json.dumps([ref]))
    files = {"images": "pictures", "instances": "instances.json", "refs": "refs.json"}
    found = report(tmp_path, "refer", "refer_seg", **files).faults
    assert [f.kind for f in found] == ["marker", "marker"], found


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("coco", {"images": "pictures", "instance": "instances.json"}, "'instance'; did you mean 'instances'?"),
        ("coco", {"images": "pictures"}, "exactly one of the options 'instances' and 'panoptic_json'"),
        ("coco", {"images": 3, "panoptic": "instances.json"}, "unknown option 'panoptic'"),
        ("llava", {"images": "pictures", "jsn": "talk.json"}, "'jsn'; did you mean 'json'?"),
    ],
)
def test_a_misspelt_option_is_told_as_showing_tells_it(tmp_path: Path, source: str, options: Any, message: str) -> None:
    coco(tmp_path)
    [fault] = report(tmp_path, source, "generic_seg", **options).faults
    assert message in fault.text and "None" not in fault.text


def test_files_without_a_sample(tmp_path: Path) -> None:
    coco(tmp_path, images=[], annotations=[])
    (tmp_path / "talk.json").write_text("[]")
    (tmp_path / "a.jsonl").write_text("\n")
    for source, task, options in (
        ("coco", "generic_seg", {"images": "pictures", "instances": "instances.json"}),
        ("llava", "conversation", {"json": "talk.json"}),
        ("jsonl", "refer_seg", {"jsonl": "a.jsonl"}),
    ):
        found = report(tmp_path, source, task, **options)
        assert found.samples == 0 and len(found.faults) == 1, found.faults
        assert "not one sample" in found.faults[0].text or "no sample there" in found.faults[0].text


def test_the_same_picture_under_other_names() -> None:
    names = ["a/COCO_train2014_000000000009.jpg", "b/000000000009.jpg", "COCO_val2017_000000000009.jpg"]
    assert {identity(Path(n)) for n in names} == {"coco 000000000009"}
    assert identity(Path("a/9.jpg")) != identity(Path("b/9.jpg"))
    drawings = [Path("train/000000000009.png"), Path("val/000000000009.png")]
    assert identity(drawings[0]) != identity(drawings[1]), "only photographs are COCO's"
