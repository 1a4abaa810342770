"""What is scored without looking, on small hand-made sets; and the way from there to the maximum."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from oracle import encoder

from xseg.config import Suite, SuiteRow, TaskSpec
from xseg.data.dataset import Dataset, Preparation
from xseg.encode import Encoder
from xseg.geometry.masks import decode, encode, iou
from xseg.geometry.views import ViewSizes
from xseg.infer.baselines import blind_guess
from xseg.infer.summary import summary
from xseg.tasks import load_task
from xseg.types import Instance, Masks, Phrase, Sample


class Listed:
    """A source of given samples."""

    categories = None

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@pytest.fixture(scope="module")
def reader() -> Encoder:
    return encoder()


def guesses(name: str, reader: Encoder, count: int = 6, **options: Any) -> tuple[Dataset, str, list[Any]]:
    """The blind predictions for copies of a task's example."""
    task = load_task(TaskSpec(name=name, **options))
    copies = [dataclasses.replace(task.example(), key=f"copy/{i}", image_id=i) for i in range(count)]
    data = Dataset(Listed(copies), task, Preparation(reader, ViewSizes(64, 32), train=False))
    found = blind_guess(data)
    assert found is not None
    return data, found[0], [found[1](data.sample(i)) for i in range(count)]


def scores(data: Dataset, predictions: list[Any]) -> dict[str, float]:
    metrics = data.task.metrics()
    for i, prediction in enumerate(predictions):
        for metric in metrics:
            metric.update(prediction, data.sample(i))
    return {s.metric: s.value for metric in metrics for s in metric.compute()}


def test_open_vocabulary_is_guessed_with_perfect_masks(reader: Encoder) -> None:
    data, text, found = guesses("open_vocab_seg", reader, 200, outputs=["panoptic"])
    assert "named at random" in text
    value = scores(data, found)
    # two names of each kind: every second thing or ground is named right, wrong names count as missed and as false
    assert value["SQ"] == pytest.approx(100) and value["RQ"] == pytest.approx(50, abs=8)
    for i, prediction in enumerate(found):
        categories = data.sample(i).categories
        assert categories is not None and prediction.panoptic is not None
        assert len(prediction.segments) == 5, "the crowd is nothing that could be named"
        things = [categories.is_thing[s.category] for s in prediction.segments]
        assert sorted(things) == [False, False, True, True, True]


def test_visual_prompts_are_their_own_masks(reader: Encoder) -> None:
    data, text, found = guesses("vgd_seg", reader, 2, kinds=["box"])
    assert "prompts themselves" in text
    segments = found[0].extra["instances"]
    assert [s.category for s in segments] == [0, 2], "one a category that is there"
    bar = data.sample(0).instances[2]
    assert iou(segments[0].mask, bar.prompts["box"]) == 1


def test_a_prompt_of_another_picture_is_laid_on_this_one(reader: Encoder) -> None:
    task = load_task(TaskSpec(name="vgd_seg", prompts_from="other", kinds=["mask"]))
    example = task.example()
    wide = np.zeros((32, 24), bool)
    wide[:16] = True
    drawn = Instance(0, 2, id=1, prompts={"mask": encode(wide)})
    masks = Masks((32, 24), (encode(wide),))
    other = dataclasses.replace(example, key="other", size=(32, 24), masks=masks, instances=(drawn,))
    data = Dataset(Listed([example, other]), task, Preparation(reader, ViewSizes(64, 32), train=False))
    found = blind_guess(data)
    assert found is not None
    block = next(s for s in found[1](data.sample(0)).extra["instances"] if s.category == 2)
    mask = decode(block.mask).astype(bool)
    assert mask.shape == (16, 24) and mask[:8].all() and not mask[8:].any()


def test_captions_are_guessed_by_their_commonest_phrases(reader: Encoder) -> None:
    data, text, found = guesses("gcg_seg", reader, 8)
    assert "commonest phrases" in text
    assert {p.text for p in found} == {"<p>two circles</p>, <p>the grass</p>."}
    assert {s.label for p in found for s in p.segments} == {"two circles", "the grass"}
    value = scores(data, found)
    # of three masks each, chance puts two words on one of three: some are right, never all
    assert 0 < value["recall"] < 67 and value["masked spans"] == 100


def test_where_an_image_has_one_object_it_is_not_given_away(reader: Encoder) -> None:
    """As in ReasonSeg: a random object of those named would always be the answer."""
    samples = []
    for i, width in enumerate((4, 4, 4, 8)):
        mask = np.zeros((8, 12), bool)
        mask[:4, :width] = True
        picture = load_task(TaskSpec(name="reason_seg")).example().images
        phrases = (Phrase("What is meant?", (0,), "0", "long"),)
        masks, instances = Masks((8, 12), (encode(mask),)), (Instance(0, -1, id=1),)
        samples.append(Sample(f"one/{i}", picture, (8, 12), masks, instances, phrases=phrases, image_id=i))
    data = Dataset(Listed(samples), load_task(TaskSpec(name="reason_seg")), Preparation(reader, ViewSizes(64, 32)))
    found = blind_guess(data)
    assert found is not None and "one constant mask" in found[0]
    value = scores(data, [found[1](data.sample(i)) for i in range(4)])
    assert value["gIoU"] == pytest.approx(100 * (3 + 0.5) / 4, abs=1), "the three equal ones are met, half of the other"
    several, text, _ = guesses("reason_seg", reader)
    assert "random object" in text and len(several.sample(0).instances) == 2


def rows(*values: tuple[str, str, float, str]) -> list[dict[str, Any]]:
    common = {"task": "t", "split": "val", "n": 7, "ci95": [1.0, 2.0]}
    return [{**common, "dataset": d, "metric": m, "value": v, "protocol": p} for d, m, v, p in values]


def test_closed_is_the_way_from_blind_to_the_maximum() -> None:
    suite = Suite(name="s", rows=[SuiteRow(recipe="a"), SuiteRow(recipe="b", headline="CIDEr"), SuiteRow(recipe="c")])
    found = summary(
        suite,
        rows(
            ("a", "PQ", 60.0, "how"),
            ("a", "SQ", 90.0, "how"),
            ("a", "oracle IoU", 80.0, "how"),
            ("a", "PQ", 20.0, "blind: so"),
            ("b", "METEOR", 5.0, "how"),
            ("b", "CIDEr", 100.0, "how"),
            ("b", "CIDEr", 200.0, "blind: so"),
            ("c", "AP", 3.0, "how"),
        ),
    )
    assert [(r["dataset"], r["metric"], r["value"], r["blind"], r["closed"]) for r in found] == [
        ("a", "PQ", 60.0, 20.0, 50.0),
        ("b", "CIDEr", 100.0, 200.0, -12.5),
        ("c", "AP", 3.0, None, None),
    ]
    assert [r["maximum"] for r in found] == [100, 1000, 100]
    assert found[0]["oracle IoU"] == 80 and "oracle IoU" not in found[1]
    assert found[0]["n"] == 7 and found[0]["ci95"] == [1.0, 2.0] and found[0]["blind_protocol"] == "blind: so"


def test_a_recipe_that_stands_twice_has_two_lines() -> None:
    suite = Suite(name="s", rows=[SuiteRow(recipe="a"), SuiteRow(recipe="a")])
    values = rows(("a", "AP", 10.0, "how"), ("a", "AP", 30.0, "how"), ("a", "AP", 20.0, "blind: so"))
    placed = [{**row, "row": number} for row, number in zip(values, (0, 1, 1), strict=True)]
    assert [(r["value"], r["blind"]) for r in summary(suite, placed)] == [(10.0, None), (30.0, 20.0)]


def test_a_perfect_guess_leaves_no_way_to_go_and_lost_headlines_are_left_out() -> None:
    suite = Suite(name="s", rows=[SuiteRow(recipe="a"), SuiteRow(recipe="b", headline="none"), SuiteRow(recipe="c")])
    values = rows(("a", "PQ", 100.0, "how"), ("a", "PQ", 100.0, "blind: so"), ("b", "AP", 3.0, "how"))
    notes: list[str] = []
    [found] = summary(suite, values, notes.append)
    assert found["dataset"] == "a" and found["closed"] is None
    assert notes == ["b: headline 'none' is not in the summary (known: AP)"], "what was skipped needs no word"
