"""Tables in VLMEvalKit's layout, written by hand here as they are downloaded there."""

import base64
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xseg.config import DataRecipe, TaskSpec
from xseg.data.lint import lint
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.tasks import load_task
from xseg.types import Prediction


def picture(shade: int, size: tuple[int, int] = (10, 6)) -> str:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), shade, np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


CHOICE = {"question": "Which is it?", "A": "a cat", "B": "a dog", "C": "", "category": "animals", "hint": ""}


def choices() -> list[dict[str, Any]]:
    return [
        {"index": 7, "image": picture(30), **CHOICE, "answer": "B"},
        {"index": 1000007, "image": "7", **CHOICE, "A": "a dog", "B": "a cat", "answer": "A"},
        {"index": 8, "image": picture(90), **CHOICE, "hint": 'Two lines\nand "quotes"', "C": "a\tfish", "answer": "C"},
    ]


def opened(folder: Path, **options: Any) -> Any:
    return load_source("tsv", folder, "val", {"file": "t.tsv", "name": "mm", **options})


def test_multiple_choice(tmp_path: Path) -> None:
    table(tmp_path / "t.tsv", choices())
    source = opened(tmp_path)
    first, rolled, third = source
    assert first.key == "mm/val/7" and first.kind == "animals" and first.images[0].size == (6, 10)
    lines = first.turns[0].text.splitlines()
    assert lines[:4] == ["<image>", "Which is it?", "A. a cat", "B. a dog"] and "letter" in lines[4] and len(lines) == 5
    assert [s.turns[1].text for s in source] == ["B", "A", "C"]
    assert first.image_id == rolled.image_id == 7 and third.image_id == 8
    assert np.asarray(rolled.images[0]).max() == 30 and np.asarray(third.images[0]).max() == 90
    assert (
        third.turns[0].text.splitlines()[1:3] == ["Hint: Two lines", 'and "quotes"']
        and "C. a\tfish" in third.turns[0].text
    )
    assert opened(tmp_path, instruction="").__getitem__(0).turns[0].text.endswith("B. a dog")
    assert len(source) == 3 and source[-1].key == third.key


def test_right_answers_score_everything(tmp_path: Path) -> None:
    table(tmp_path / "t.tsv", choices())
    [metric] = load_task(TaskSpec(name="conversation", answers="letter")).metrics()
    for sample, said in zip(opened(tmp_path), ("B", "(B) a cat", "C."), strict=True):
        metric.update(Prediction(sample.key, text=said), sample)
    values = {s.metric: s.value for s in metric.compute()}
    assert values == {"accuracy": pytest.approx(200 / 3), "circular accuracy": pytest.approx(50)}


def test_yes_or_no_about_pictures(tmp_path: Path) -> None:
    rows = [
        {"index": k, "image": picture(k), "image_path": f"count/{k // 2}.jpg", "question": "Two?", "answer": said}
        | {"category": "count"}
        for k, said in enumerate(("Yes", "No", "Yes", "No"))
    ]
    table(tmp_path / "t.tsv", rows)
    source = opened(tmp_path, group="image", instruction="Please answer yes or no.")
    assert [s.image_id for s in source] == ["count/0.jpg"] * 2 + ["count/1.jpg"] * 2
    assert source[0].turns[0].text == "<image>\nTwo?\nPlease answer yes or no."
    [metric] = load_task(TaskSpec(name="conversation", answers="yes_no")).metrics()
    for sample, said in zip(source, ("Yes", "No", "Yes", "Yes"), strict=True):
        metric.update(Prediction(sample.key, text=said), sample)
    values = {s.metric: s.value for s in metric.compute()}
    assert (values["accuracy"], values["accuracy+"]) == (75, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "D"}, "answer 'D' is none of the options A, B"),
        ({"answer": ""}, "no answer"),
        ({"image": "99"}, "neither a picture nor the index"),
        ({"image": "x" * 100}, "cannot be decoded"),
        ({"image": base64.b64encode(b"no picture at all" * 9).decode()}, "cannot be decoded"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    rows = choices()[:2]
    table(tmp_path / "t.tsv", [rows[0] | change, rows[1]])
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path)[0]
    assert "row 1" in str(error.value)


def test_a_wrong_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such table"):
        opened(tmp_path)
    (tmp_path / "t.tsv").write_text("index\tquestion\n1\tq\n")
    with pytest.raises(UserError, match="column 'image'"):
        opened(tmp_path)
    (tmp_path / "t.tsv").write_text("index\tquestion\timage\n1\tq\n")
    with pytest.raises(UserError, match="row 1: 2 cells for 3"):
        opened(tmp_path)
    (tmp_path / "t.tsv").write_text('index\tquestion\timage\n1\t"q\tx\n')
    with pytest.raises(UserError, match="cut short"):
        opened(tmp_path)
    (tmp_path / "t.tsv").write_text("")
    with pytest.raises(UserError, match="is empty"):
        opened(tmp_path)
    table(tmp_path / "t.tsv", choices())
    with pytest.raises(UserError, match="group: 'picture'"):
        opened(tmp_path, group="picture")
    with pytest.raises(UserError, match="image_path"):
        opened(tmp_path, group="image")[0]


def test_lint_reads_tables_and_their_checksums(tmp_path: Path) -> None:
    import hashlib

    path = table(tmp_path / "t.tsv", choices())
    stated = hashlib.md5(path.read_bytes()).hexdigest()

    def recipe(**fields: Any) -> DataRecipe:
        task = TaskSpec(name="conversation", answers="letter")
        return DataRecipe(source="tsv", options={"file": "t.tsv"}, task=task, split="val", **fields)

    [good, unknown, wrong], _ = lint(
        {
            "good": recipe(md5={"t.tsv": stated.upper()}, count=3, download="somewhere"),
            "unknown": recipe(download="somewhere"),
            "wrong": recipe(md5={"t.tsv": "0" * 32}, sha256={"lost.tsv": "0" * 64}, count=4),
        },
        tmp_path,
    )
    assert (good.samples, good.faults, good.sums) == (3, [], {})
    assert unknown.sums == {"t.tsv": hashlib.sha256(path.read_bytes()).hexdigest()} and unknown.faults == []
    assert sorted(fault.kind for fault in wrong.faults) == ["checksum", "checksum", "count"]
