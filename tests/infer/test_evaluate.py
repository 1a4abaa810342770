import json
from pathlib import Path

import pytest
from oracle import oracle, shapes

from xseg.config import Suite, SuiteRow, TaskSpec
from xseg.data.checksums import digest
from xseg.errors import UserError
from xseg.geometry import masks as rle
from xseg.infer.evaluate import Evaluation, evaluate, share_images

ROWS = ["shapes/panoptic_val", "shapes/refer_val", "shapes/talk_val"]


def suite(*names: str) -> Suite:
    return Suite(name="test", rows=[SuiteRow(recipe=name) for name in names])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data"))


def value(results: dict, metric: str, blind: bool = False) -> float:
    found = [r for r in results["rows"] if r["metric"] == metric and r["protocol"].startswith("blind") == blind]
    assert len(found) == 1, metric
    return found[0]["value"]


def test_targets_as_answers_score_the_maximum(root: Path, tmp_path: Path) -> None:
    predictor = oracle()
    predictor.model.answers = ["nothing"]
    results = evaluate(predictor, suite(*ROWS), Evaluation(root, tmp_path, batch_size=2))
    assert value(results, "PQ") == pytest.approx(100, abs=0.01)
    assert value(results, "mIoU") == pytest.approx(100, abs=0.01)
    assert value(results, "cIoU") == pytest.approx(100, abs=0.01)
    assert value(results, "N-acc") == 100
    assert value(results, "exact match") == 0
    assert value(results, "cIoU", blind=True) < 60
    assert 0 < value(results, "exact match", blind=True) < 100
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {r["n"] for r in results["rows"] if r["metric"] == "PQ"} == {5}
    for row in results["rows"]:
        assert set(row) >= {"task", "dataset", "split", "metric", "value", "n", "ci95", "protocol"}
    assert results["versions"]["torch"]


def test_batch_size_changes_nothing_but_the_speed(root: Path, tmp_path: Path) -> None:
    runs = []
    for size in (1, 3):
        predictor = oracle()
        results = evaluate(predictor, suite(*ROWS[:2]), Evaluation(root, tmp_path / str(size), batch_size=size))
        runs.append((results["rows"], (tmp_path / str(size) / "samples.jsonl").read_text()))
        samples = (tmp_path / str(size) / "samples.jsonl").read_text().count("\n")
        assert predictor.model.forwards == -(-5 // size) + -(-(samples - 5) // size)
    assert runs[0] == runs[1]


def test_one_line_per_sample_with_its_masks(root: Path, tmp_path: Path) -> None:
    predictor = oracle()
    evaluate(predictor, suite(*ROWS[1:]), Evaluation(root, tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    refer = [line for line in lines if line["task"] == "refer_seg"]
    assert len(refer) > 5 and len({line["key"] for line in lines}) == len(lines)
    assert refer[0]["scores"]["gIoU"] == 100
    assert any(rle.area(rle.from_json(s["mask"])) for s in refer[0]["segments"])
    talk = next(line for line in lines if line["task"] == "conversation")
    assert talk["text"] == "Sure, the segmentation mask is <SEG>."
    assert not list(tmp_path.glob("*.partial"))


def test_stage_one_is_scored_by_its_label_list(root: Path, tmp_path: Path) -> None:
    predictor, notes = oracle(text=False, labels=13), []
    results = evaluate(predictor, suite(*ROWS), Evaluation(root, tmp_path, note=notes.append))
    assert len(notes) == 2 and "refer_val" in notes[0]
    assert value(results, "PQ") == pytest.approx(100, abs=0.01)
    assert {r["dataset"] for r in results["rows"]} == {ROWS[0]}
    assert any("fixed label list" in r["protocol"] for r in results["rows"])
    with pytest.raises(UserError, match="13 categories"):
        evaluate(oracle(text=False, labels=4), suite(ROWS[0]), Evaluation(root, tmp_path))
    with pytest.raises(UserError, match="no row"):
        evaluate(predictor, suite(ROWS[1]), Evaluation(root, tmp_path / "none"))
    assert not (tmp_path / "none/results.json").exists()


def test_published_values_stand_beside_the_measured_ones(root: Path, tmp_path: Path) -> None:
    whole = SuiteRow(recipe=ROWS[0], published={"PQ": 54.7}, published_source="a paper")
    rows = [whole, whole.model_copy(update={"limit": 2})]
    results = evaluate(oracle(), Suite(name="test", rows=rows), Evaluation(root, tmp_path))
    [found] = [r for r in results["rows"] if "published" in r]
    assert (found["metric"], found["published"], found["published_source"]) == ("PQ", 54.7, "a paper")
    assert found["row"] == 0 and found["n"] > 2, "a part of the data is not what was published"


def test_results_say_what_was_asked_of_what(root: Path, tmp_path: Path) -> None:
    row = SuiteRow(recipe="shapes/refer_val", task=TaskSpec(name="refer_seg", join=0.6), limit=3)
    results = evaluate(oracle(), Suite(name="test", rows=[row]), Evaluation(root, tmp_path, model="runs/a/final"))
    assert results["trained"] == "runs/a/final" and results["calibration"] is None
    [asked] = results["asked"]
    assert asked["task"]["join"] == 0.6 and asked["task"]["mask_threshold"] == 0.5 and asked["limit"] == 3
    assert asked["source"]["refs"] == "shapes/val/refs.json" and asked["source"]["split"] == "val"
    assert set(asked["sha256"]) == {"shapes/val/refs.json", "shapes/val/instances.json"}
    assert asked["sha256"]["shapes/val/refs.json"] == digest(root / "shapes/val/refs.json", "sha256")


def test_a_row_may_replace_the_task(root: Path, tmp_path: Path) -> None:
    row = SuiteRow(recipe=ROWS[0], task=TaskSpec(name="generic_seg", outputs=["semantic"]))
    results = evaluate(oracle(), Suite(name="test", rows=[row]), Evaluation(root, tmp_path))
    assert {r["metric"] for r in results["rows"]} == {"mIoU"}


def test_lines_of_instances_keep_the_likely_ones(root: Path, tmp_path: Path) -> None:
    row = SuiteRow(recipe=ROWS[0], task=TaskSpec(name="generic_seg", outputs=["instance"]))
    evaluate(oracle(), Suite(name="test", rows=[row]), Evaluation(root, tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all(line["segments"] and min(s["score"] for s in line["segments"]) >= 0.5 for line in lines)


WITHOUT = ("I see none.", "<SEG> or <SEG>", "<p>the cat</p> is <SEG>.")


@pytest.mark.parametrize("speaks", [False, True])
@pytest.mark.parametrize("asked", [None, "given", "generated"])
def test_a_model_that_speaks_first_finds_its_answers_unless_told(
    root: Path, tmp_path: Path, speaks: bool, asked: str | None
) -> None:
    row = SuiteRow(recipe=ROWS[1], task=TaskSpec(name="refer_seg", **({"answer": asked} if asked else {})))
    generated = speaks if asked is None else asked == "generated"
    for answer, found in (("It is here: <SEG>.", True), *((text, False) for text in WITHOUT)):
        predictor = oracle()
        predictor.model.answers, predictor.processor.speaks_first = [answer], ["refer_seg"] * speaks
        results = evaluate(predictor, Suite(name="test", rows=[row]), Evaluation(root, tmp_path))
        assert value(results, "cIoU") == pytest.approx(100 if found or not generated else 0, abs=0.01)
        assert value(results, "N-acc") == 100
        heard = [r["value"] for r in results["rows"] if r["metric"] == "answered" and "blind" not in r["protocol"]]
        assert heard == ([100.0 * found] if generated else [])
        measured = [r for r in results["rows"] if not r["protocol"].startswith("blind")]
        assert {"the answer is generated" in r["protocol"] for r in measured} == {generated}
        texts = {json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()}
        assert texts == ({answer} if generated else {""})


def test_sentences_about_one_picture_share_it(root: Path, tmp_path: Path) -> None:
    predictor = oracle()
    evaluate(predictor, suite(ROWS[1]), Evaluation(root, tmp_path, batch_size=64))
    [batch] = predictor.model.seen
    assert len(batch.mask_pixels) == len(batch.llm_pixels) == len(batch.geometry) == 5
    pairs = {(int(i), int(s)) for i, s in zip(batch.query_image, batch.query_slot, strict=True)}
    assert len(pairs) == len(batch.query_image) > 5 and max(s for _, s in pairs) == batch.max_queries - 1
    assert batch.image_slot[:, 0].tolist() == list(range(len(batch.keys)))
    assert batch.image_slot[:, 2].tolist() == batch.query_image.tolist()
    assert share_images(batch, list("abcde")) is batch
