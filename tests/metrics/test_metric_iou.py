"""Scores per sentence, by hand."""

import numpy as np
import pytest

from xseg.errors import UserError
from xseg.metrics import truth
from xseg.metrics.iou import PhraseIoU
from xseg.types import Instance, Masks, Phrase, Prediction, Sample, Score, Segment

SIZE = (1, 20)


def line(start: int, end: int) -> dict[str, object]:
    dense = np.zeros(SIZE, bool)
    dense[0, start:end] = True
    return truth.encode(dense)


def case(
    phrases: list[tuple[tuple[int, ...], str]], found: list[tuple[int, int]], image: int = 1, **fields: object
) -> tuple[Prediction, Sample]:
    """Instances: 0 = pixels 0..10, 1 = pixels 10..14."""
    masks = Masks(SIZE, (line(0, 10), line(10, 14)))
    texts = tuple(Phrase(str(k), i, kind=kind) for k, (i, kind) in enumerate(phrases))
    sample = Sample(f"s{image}", (), SIZE, masks, (Instance(0, -1), Instance(1, -1)), None, texts, image_id=image)
    sample = Sample(**{**sample.__dict__, **fields})
    return Prediction("s", tuple(Segment(line(a, b)) for a, b in found)), sample


def scores(metric: PhraseIoU) -> dict[str, Score]:
    return {s.metric: s for s in metric.compute()}


def test_by_hand() -> None:
    metric = PhraseIoU()
    metric.update(*case([((0,), "one"), ((1,), "one")], [(0, 8), (10, 14)]))  # 8/10, 4/4
    metric.update(*case([((0, 1), "many")], [(2, 9)], image=2))  # 7/14
    metric.update(*case([((), "none"), ((), "none")], [(0, 0), (3, 5)], image=3))  # 0/0, 0/2
    metric.update(*case([((1,), "one")], [(0, 0)], image=4))  # 0/4, wrongly refused
    got = scores(metric)
    assert got["cIoU"].value == pytest.approx(100 * (8 + 4 + 7) / (10 + 4 + 14 + 2 + 4))
    assert got["gIoU"].value == pytest.approx(100 * (0.8 + 1 + 0.5 + 1 + 0 + 0) / 6)
    assert [got[f"P@{k}"].value for k in (0.5, 0.7, 0.9)] == pytest.approx([75, 50, 25])
    assert (got["N-acc"].value, got["N-acc"].n) == (50, 2)
    assert (got["T-acc"].value, got["T-acc"].n) == (75, 4)
    assert (got["cIoU"].n, got["P@0.5"].n) == (6, 4)
    assert got["cIoU:one"].value == pytest.approx(100 * 12 / 18) and got["cIoU:one"].n == 3
    assert got["gIoU:none"].value == pytest.approx(50)
    low, high = got["gIoU"].ci95 or (0, 0)
    assert 0 <= low < got["gIoU"].value < high <= 100


def test_no_target_scores_are_left_out_where_every_phrase_has_one() -> None:
    metric = PhraseIoU()
    metric.update(*case([((0,), "")], [(0, 10)]))
    assert set(scores(metric)) == {"cIoU", "gIoU", "P@0.5", "P@0.7", "P@0.9", "T-acc"}
    assert all(s.value == 100 and s.ci95 is None for s in metric.compute())
    assert PhraseIoU().compute() == []


def test_union_of_nothing_is_agreement_in_both_means() -> None:
    metric = PhraseIoU()
    metric.update(*case([((), "")], [(0, 0)]))
    got = scores(metric)
    assert got["cIoU"].value == got["gIoU"].value == got["N-acc"].value == 100


def test_ignored_pixels_and_missing_masks() -> None:
    metric = PhraseIoU()
    metric.update(*case([((0,), "")], [(0, 12)], ignore=line(8, 20)))
    assert scores(metric)["cIoU"].value == 100
    metric.update(*case([((0,), ""), ((1,), "")], [(0, 10)]))  # the answer held one <SEG> only
    assert scores(metric)["cIoU"].value == pytest.approx(100 * 18 / 22)
    assert metric.update(*case([((0,), ""), ((1,), "")], [(0, 5)])) == {"gIoU": 25}
    assert PhraseIoU("object").update(*case([((0,), "")], [(0, 5)])) == {"mIoU": 50}


def test_interval_resamples_images_not_sentences() -> None:
    one_image, many = PhraseIoU(), PhraseIoU()
    for k in range(20):
        one_image.update(*case([((0,), "")], [(0, 10 if k % 2 else 0)], image=1))
        many.update(*case([((0,), "")], [(0, 10 if k % 2 else 0)], image=k + 1))
    assert scores(one_image)["gIoU"].ci95 is None
    low, high = scores(many)["gIoU"].ci95 or (0, 0)
    # binomial: 50 +- 1.96 * sqrt(.25 / 20) = 28 .. 72
    assert 25 <= low <= 35 and 65 <= high <= 75


def test_merge() -> None:
    whole, left, right = PhraseIoU(), PhraseIoU(), PhraseIoU()
    for k in range(6):
        pair = case([((0,), "a"), ((), "b")], [(0, k + 1), (0, k % 2)], image=k + 1)
        whole.update(*pair)
        (left if k < 3 else right).update(*pair)
    left += right
    assert left.compute() == whole.compute()


def test_turns_of_one_conversation_stand_in_the_protocol() -> None:
    apart, together = PhraseIoU(), PhraseIoU()
    apart.update(*case([((0,), "")], [(0, 10)]))
    together.update(*case([((0,), ""), ((1,), "")], [(0, 10), (10, 14)]))
    assert not any("one conversation" in s.protocol for s in apart.compute())
    apart += together
    for metric in (apart, together):
        assert all("one conversation" in s.protocol for s in metric.compute())


def test_a_reference_whose_sentences_stand_in_several_samples_was_not_merged() -> None:
    first, second = (case([((0,), "")], [(0, 10)], key=key) for key in ("a", "b"))
    metric, other = PhraseIoU("reference"), PhraseIoU("reference")
    metric.update(*first)
    metric.update(*first)
    with pytest.raises(UserError, match="grouping: reference"):
        metric.update(*second)
    other.update(*second)
    with pytest.raises(UserError, match="grouping: reference"):
        other += metric


def test_wrong_shape_names_the_sample() -> None:
    _, sample = case([((0,), "")], [])
    with pytest.raises(ValueError, match="s1"):
        PhraseIoU().update(Prediction("s", (Segment(truth.encode(np.zeros((2, 20)))),)), sample)
