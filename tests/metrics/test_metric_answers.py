"""Exact match, and the baselines that see no image."""

import numpy as np
import pytest

from xseg.metrics import blind, truth
from xseg.metrics.answers import ExactMatch, normalise
from xseg.metrics.iou import PhraseIoU
from xseg.metrics.panoptic import PanopticQuality
from xseg.metrics.semantic import MeanIoU
from xseg.types import Categories, Instance, Masks, Phrase, Prediction, Sample, Turn


def asked(answer: str, kind: str = "", image: int = 1) -> Sample:
    return Sample(f"q{image}", (), turns=(Turn("user", "?"), Turn("assistant", answer)), kind=kind, image_id=image)


@pytest.mark.parametrize(
    ("said", "meant", "same"),
    [
        ("Two.<|end|>", "two", True),
        ("  the red\ncircle </s>", "The red circle!", True),
        ("no", "not", False),
        ("", "two", False),
        ("left of", "leftof", False),
    ],
)
def test_normalised_equality(said: str, meant: str, same: bool) -> None:
    assert (normalise(said) == normalise(meant)) is same


def test_scores_per_kind_and_merge() -> None:
    left, right = ExactMatch(), ExactMatch()
    for k, (said, meant, kind) in enumerate([("2", "2", "count"), ("3", "2", "count"), ("Red.", "red", "colour")]):
        own = (left if k else right).update(Prediction("q", text=said), asked(meant, kind, k + 1))
        assert own == {"exact match": 0 if said == "3" else 100}
    left += right
    got = {s.metric: (round(s.value, 3), s.n) for s in left.compute()}
    assert got == {"exact match": (66.667, 3), "exact match:count": (50, 2), "exact match:colour": (100, 1)}
    assert ExactMatch().compute() == []


def test_commonest_answer_per_kind() -> None:
    train = [asked("Two.", "count"), asked("two", "count"), asked("3", "count"), asked("red", "colour"), asked("two")]
    answers = blind.commonest_answers(train)
    assert answers == {"": "two", "count": "two", "colour": "red"}
    assert blind.blind_answer(answers, asked("x", "colour")).text == "red"
    assert blind.blind_answer(answers, asked("x", "shape")).text == "two"
    assert blind.blind_answer({}, asked("x")).text == ""


def scene(shift: int = 0) -> Sample:
    id_map = np.full((16, 24), 2, np.int32)
    id_map[:8], id_map[4:10, 4 + shift : 9 + shift] = 1, 3
    masks = Masks((16, 24), id_map=id_map, ids=(1, 2, 3))
    categories = Categories(("sky", "grass", "cat"), (1, 2, 3), (False, False, True))
    instances = (Instance(0, 0), Instance(1, 1), Instance(2, 2))
    phrases = (Phrase("the cat", (2,)), Phrase("a dog"))
    return Sample(f"scene{shift}", (), (16, 24), masks, instances, categories, phrases, image_id=shift + 1)


def test_random_object_is_one_of_the_objects_and_is_seeded() -> None:
    sample = scene()
    want = [truth.rle(sample.masks, k) for k in range(3)]  # type: ignore[arg-type]
    drawn = [blind.random_object(sample, np.random.default_rng([0, k])) for k in range(30)]
    assert all(dict(s.mask) in want for p in drawn for s in p.segments)
    assert {want.index(dict(p.segments[0].mask)) for p in drawn} == {0, 1, 2}
    again = blind.random_object(sample, np.random.default_rng([0, 7]))
    assert [dict(s.mask) for s in again.segments] == [dict(s.mask) for s in drawn[7].segments]
    metric = PhraseIoU()
    metric.update(drawn[0], sample)
    assert {s.metric: s.value for s in metric.compute()}["N-acc"] == 0


def test_constant_panoptic_map_is_the_commonest_category_at_each_place() -> None:
    commonest = blind.mean_map([scene(0), scene(6), scene(14)], grid=8)
    assert commonest.shape == (8, 8) and set(np.unique(commonest)) == {0, 1}
    assert (commonest[0] == 0).all() and (commonest[-1] == 1).all()
    guess = blind.constant_panoptic(commonest, scene(3))
    quality, mean = PanopticQuality(), MeanIoU()
    quality.update(guess, scene(3))
    mean.update(guess, scene(3))
    got = {s.metric: s.value for s in quality.compute()}
    assert got["PQ things"] == 0 and got["PQ stuff"] > 75
    assert 50 < mean.compute()[0].value < 67
    assert blind.mean_map([]).max() == -1
    assert blind.constant_panoptic(np.full((8, 8), -1), scene()).segments == ()


def test_numbers_keep_their_points_and_signs() -> None:
    assert normalise("It is 1.5.") == "it is 1.5" != normalise("It is 15")
    assert normalise("-3") != normalise("3") == normalise("3!")
    assert normalise("A red-hot, round one.<|end|>") == "a redhot round one"
