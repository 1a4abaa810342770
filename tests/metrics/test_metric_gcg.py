"""Grounded captions by hand: words, masks, and both together."""

import sys
from types import ModuleType

import numpy as np
import pytest

from xseg.metrics import captions, truth
from xseg.metrics.gcg import GroundedCaption, compare
from xseg.types import Instance, Masks, Phrase, Prediction, Sample, Score, Segment, Turn

SIZE = (1, 20)


def line(start: int, end: int) -> dict[str, object]:
    dense = np.zeros(SIZE, bool)
    dense[0, start:end] = True
    return truth.encode(dense)


def sample(caption: str, spans: list[tuple[str, list[tuple[int, int]]]], image: int = 1) -> Sample:
    rles, phrases = [], []
    for text, lines in spans:
        phrases.append(Phrase(text, tuple(range(len(rles), len(rles) + len(lines)))))
        rles += [line(a, b) for a, b in lines]
    instances = tuple(Instance(k, -1, id=k) for k in range(len(rles)))
    turns = (Turn("assistant", caption),)
    return Sample(f"s{image}", (), SIZE, Masks(SIZE, tuple(rles)), instances, None, tuple(phrases), turns, image)


def answer(text: str, found: list[tuple[str, tuple[int, int]]]) -> Prediction:
    labels = list(dict.fromkeys(label for label, _ in found))
    return Prediction("s", tuple(Segment(line(*at), labels.index(t), 0.7, t) for t, at in found), text=text)


TRUE = sample("A <p>red dog</p> on <p>grass</p>.", [("red dog", [(0, 4), (4, 8)]), ("grass", [(10, 20)])])
FOUND = answer(
    "a <p>red cat</p> beside <p>a wall</p>. It is <SEG>.",
    [("red cat", (0, 4)), ("a wall", (10, 16))],
)


def scores(metric: GroundedCaption) -> dict[str, Score]:
    return {s.metric: s for s in metric.compute()}


def test_masks_by_hand() -> None:
    metric = GroundedCaption()
    assert metric.update(FOUND, TRUE) == {"mIoU": pytest.approx(80), "recall": pytest.approx(100 / 3)}
    got = scores(metric)
    # pairs: the cat on the left dog 4/4, the wall on the grass 6/10; the right dog has none
    assert got["mIoU"].value == pytest.approx(100 * (1 + 0.6) / 2) and got["mIoU"].n == 1
    # "red cat" and "red dog" share half their words, "a wall" and "grass" none
    assert got["recall"].value == pytest.approx(100 / 3) and got["recall"].n == 3
    assert got["masked spans"].value == 100 and got["masked spans"].n == 2
    # two of three masks at precision 1: 67 of the 101 recall levels
    assert got["AP50"].value == pytest.approx(100 * 67 / 101)
    assert "CIDEr" not in got and "METEOR" not in got, "one caption has no document frequencies"
    assert all(s.protocol for s in got.values())


def test_an_answer_without_masks_counts_against_the_model() -> None:
    metric = GroundedCaption()
    metric.update(answer("a <p>red dog</p> and <p>grass</p>.", []), TRUE)
    metric.update(answer("nothing", []), sample("nothing", [], image=2))
    got = scores(metric)
    assert got["mIoU"].value == got["recall"].value == got["AP50"].value == got["masked spans"].value == 0
    assert (got["mIoU"].n, got["recall"].n, got["masked spans"].n) == (2, 3, 2)


def test_empty_masks_are_none() -> None:
    found = compare(answer("<p>red dog</p> <SEG>", [("red dog", (3, 3))]), TRUE)
    assert (found.miou, found.hits, found.spans, found.masked) == (0, 0, 1, 0)


def test_captions_lose_their_markers_and_the_sentence_of_the_seg() -> None:
    assert captions.caption("a <p>Dog</p> runs. it sits. The masks are <SEG>.") == "a Dog runs. it sits."
    assert captions.caption("a <p>dog runs.") == "a dog runs."
    assert captions.caption("<SEG>.") == ""
    assert captions.words("The man's 2 dogs, don't") == ["the", "man", "'s", "2", "dogs", "don", "t"]
    assert captions.word_f1("red cat", "a red dog") == pytest.approx(2 / 5) and captions.word_f1("", "a") == 0


def test_cider_by_hand() -> None:
    # every word stands in one reference of two: all weights are log 2.
    # "red cat" for "red dog": unigrams 1/2, bigrams 0, none longer; "blue cat": unigrams 1, bigrams 1
    found = captions.cider(["red cat", "blue cat"], ["red dog", "blue cat"])
    assert found == pytest.approx([10 * 0.5 / 4, 10 * 2 / 4])
    # a word too many: one third of the norm is elsewhere, and a length penalty
    longer = captions.cider(["red dog barks", "x"], ["red dog", "blue cat"])[0]
    uni, bi = 2 / np.sqrt(6), 1 / np.sqrt(2)
    assert longer == pytest.approx(10 * (uni + bi) / 4 * np.exp(-1 / 72))
    # a repeated word counts no more often than the reference has it: weights 2 and 1 against 1 and 1
    twice = captions.cider(["dog dog", "x"], ["red dog", "blue cat"])[0]
    assert twice == pytest.approx(10 * (1 / (2 * np.sqrt(2))) / 4)
    words = ["one two three four five", "six seven eight nine ten"]
    assert captions.cider(words, words) == pytest.approx([10, 10])


def pair_of_captions() -> GroundedCaption:
    metric = GroundedCaption()
    metric.update(answer("red cat.", []), sample("red dog.", [], 1))
    metric.update(answer("blue cat.", []), sample("blue cat.", [], 2))
    return metric


def test_cider_is_in_percent_with_an_interval() -> None:
    cider = scores(pair_of_captions())["CIDEr"]
    assert cider.value == pytest.approx(100 * (1.25 + 5) / 2) and cider.n == 2
    assert cider.ci95 == pytest.approx((125, 500))


def test_meteor_is_named_where_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    metric = pair_of_captions()
    (note,) = metric.notes()
    assert "METEOR is left out" in note and "Java" in note and "METEOR" not in scores(metric)


def test_meteor_is_asked_of_its_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Meteor:
        def compute_score(self, references: dict, found: dict) -> tuple[float, list[float]]:
            asked.append((references, found))
            return 0.25, [0.1, 0.5]

    module = ModuleType("pycocoevalcap.meteor.meteor")
    module.Meteor = Meteor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", module)
    monkeypatch.setattr(captions, "missing_for_meteor", lambda: "")
    metric = pair_of_captions()
    meteor = scores(metric)["METEOR"]
    assert meteor.value == 25 and meteor.ci95 == pytest.approx((10, 50)) and metric.notes() == []
    assert asked == [({0: ["red dog"], 1: ["blue cat"]}, {0: ["red cat"], 1: ["blue cat"]})]


def test_meteor_where_it_is_at_hand() -> None:
    if missing := captions.missing_for_meteor():
        pytest.skip(f"METEOR needs {missing}")
    whole, each = captions.meteor(["a red dog on the grass", "two blue birds"], ["a red dog on the grass", "no match"])
    assert each == pytest.approx([1, 0], abs=1e-6) and 0.5 < whole < 1


def test_merge() -> None:
    whole, left, right = GroundedCaption(), GroundedCaption(), GroundedCaption()
    for k in range(4):
        true = sample(f"a <p>dog {k}</p>.", [("dog", [(0, 4 + k)])], image=k)
        found = answer(f"a <p>dog {k % 2}</p>. <SEG>", [("dog", (0, 5))])
        whole.update(found, true)
        (left if k < 2 else right).update(found, true)
    left += right
    assert left.compute() == whole.compute()
