"""What is scored of a JSONL, and what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from oracle import oracle
from PIL import Image

from xseg.config import Suite, SuiteRow
from xseg.errors import UserError
from xseg.infer.calibrate import Asked, calibrate
from xseg.infer.evaluate import Evaluation, evaluate

OBJECTS = [{"segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}, {"segmentation": [[30, 30, 50, 30, 50, 60, 30, 60]]}]
PHRASES = [{"text": f"thing {k}", "objects": [k]} for k in range(2)] + [{"text": "a cat", "objects": []}]


def row(root: Path, line: dict[str, Any], task: str, split: str = "val", **options: str) -> SuiteRow:
    Image.new("RGB", (64, 64), (90, 90, 90)).save(root / "a.png")
    (root / "a.jsonl").write_text(json.dumps({"image": "a.png", **line}) + "\n")
    recipe = {"source": "jsonl", "options": {"jsonl": "a.jsonl", **options}, "split": split}
    (root / "mine.yaml").write_text(json.dumps({**recipe, "task": json.loads(task)}))
    return SuiteRow(recipe=str(root / "mine.yaml"))


def scored(root: Path, asked: SuiteRow, out: str = "out") -> list[dict[str, Any]]:
    found = evaluate(oracle(), Suite(name="test", rows=[asked]), Evaluation(root, root / out, batch_size=2))
    return [r for r in found["rows"] if not r["protocol"].startswith("blind")]


@pytest.mark.parametrize(
    ("line", "task", "metric", "count"),
    [
        ({"objects": OBJECTS, "phrases": PHRASES}, "refer_seg", "gIoU", 3),
        ({"objects": OBJECTS}, "interactive_seg", "mIoU", 2),
    ],
)
def test_every_phrase_and_object_is_answered(tmp_path: Path, line: Any, task: str, metric: str, count: int) -> None:
    asked = row(tmp_path, line, f'{{"name": "{task}", "answer": "generated"}}')
    found = {r["metric"]: r for r in scored(tmp_path, asked)}
    assert found[metric]["n"] == count == found["answered"]["n"] and found["answered"]["value"] == 100
    assert not any("one conversation" in r["protocol"] for r in found.values())
    keys = [json.loads(text)["key"] for text in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert keys == [f"jsonl/val/1:{k}" for k in range(count)]


def test_a_threshold_is_chosen_on_phrases_of_a_line(tmp_path: Path) -> None:
    asked = row(tmp_path, {"objects": OBJECTS, "phrases": PHRASES}, '{"name": "refer_seg", "answer": "generated"}')
    assert calibrate(oracle(), Asked(asked.recipe, tmp_path)).phrases == 3


def test_several_phrases_together_say_what_to_do(tmp_path: Path) -> None:
    task = '{"name": "refer_seg", "answer": "generated"}'
    asked = row(tmp_path, {"objects": OBJECTS, "phrases": PHRASES}, task, "train")
    with pytest.raises(UserError, match=r"3 phrases or objects, .* grouping: 'sentence'"):
        scored(tmp_path, asked)
    asked = row(tmp_path, {"objects": OBJECTS, "phrases": PHRASES}, task, "train", grouping="sentence")
    assert {r["n"] for r in scored(tmp_path, asked) if r["metric"] == "gIoU"} == {3}


def test_a_question_without_an_answer_is_not_scored(tmp_path: Path) -> None:
    texts = ["How many?", "Two.", "Why?"]
    turns = [{"role": ("user", "assistant")[k % 2], "text": text} for k, text in enumerate(texts)]
    with pytest.raises(UserError, match="jsonl/val/1: its last turn has no answer"):
        scored(tmp_path, row(tmp_path, {"turns": turns}, '{"name": "conversation"}'))
    assert not (tmp_path / "out").exists()


def test_files_without_a_sample_are_not_scored(tmp_path: Path) -> None:
    recipe = {"source": "llava", "options": {"json": "talk.json"}, "task": "conversation", "split": "val"}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    (tmp_path / "talk.json").write_text("[]")
    with pytest.raises(UserError, match=r"mine\.yaml: its files hold no sample"):
        scored(tmp_path, SuiteRow(recipe=str(tmp_path / "mine.yaml")))
    assert not (tmp_path / "out").exists()
