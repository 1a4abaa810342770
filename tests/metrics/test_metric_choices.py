"""Letters, and yes and no, counted by hand."""

import pytest

from xseg.metrics.choices import COGNITION, PERCEPTION, Letters, YesNo, letter, yes_or_no
from xseg.types import Prediction, Sample, Score, Turn


def case(said: str, wanted: str, image: str = "1", kind: str = "") -> tuple[Prediction, Sample]:
    turns = (Turn("user", "?"), Turn("assistant", wanted))
    return Prediction("s", text=said), Sample("s", (), turns=turns, image_id=image, kind=kind)


def scores(metric: Letters | YesNo) -> dict[str, Score]:
    return {s.metric: s for s in metric.compute()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"), ("b", "B"), ("(C) a dog", "C"), ("C. a dog", "C"), ("D<|end|>", "D"), ("The answer is B", "B"),
        ("Answer: E", "E"), ("Option F because", "F"), ("A dog", ""), ("a dog", ""), ("Because", ""), ("I", ""),
        ("The answer is a dog", ""), ("A.", "A"), ("A\n", "A"), ("", ""),
    ],
)  # fmt: skip
def test_the_letter_a_text_begins_with(text: str, found: str) -> None:
    assert letter(text) == found


def test_the_first_yes_or_no_counts() -> None:
    said = [yes_or_no(text) for text in ("Yes.", "no, it is not", "There is no dog", "nothing", "Not at all: yes")]
    assert said == ["yes", "no", "no", "", "yes"]


def test_a_question_is_right_when_every_order_is() -> None:
    metric = Letters()
    for said, wanted, question in (
        ("A", "A", "1"),
        ("B.", "B", "1"),
        ("A", "A", "2"),
        ("A", "B", "2"),
        ("C", "C", "3"),
    ):
        metric.update(*case(said, wanted, question))
    got = scores(metric)
    assert got["accuracy"].value == pytest.approx(80) and got["accuracy"].n == 5
    assert got["circular accuracy"].value == pytest.approx(200 / 3) and got["circular accuracy"].n == 3
    assert "exact matching" in got["accuracy"].protocol
    plain = Letters()
    assert plain.update(*case("A", "A")) == {"accuracy": 100}
    assert list(scores(plain)) == ["accuracy"] and Letters().compute() == []


def test_accuracy_per_picture_and_f1() -> None:
    metric, other = YesNo(), YesNo()
    assert metric.update(*case("yes", "Yes", "a")) == {"accuracy": 100}
    assert metric.update(*case("yes", "No", "a")) == {"accuracy": 0}
    other.update(*case("no", "Yes", "b"))
    other.update(*case("no", "No", "b"))
    other.update(*case("Yes, there is", "Yes", "c"))
    metric += other
    got = scores(metric)
    assert got["accuracy"].value == pytest.approx(60) and got["accuracy"].n == 5
    assert got["F1"].value == pytest.approx(100 * 4 / 6)  # 2 right yes, 3 said, 3 annotated
    assert got["accuracy+"].value == pytest.approx(100 / 3) and got["accuracy+"].n == 3


def test_the_sums_of_mme() -> None:
    metric = YesNo()
    for kind in PERCEPTION + COGNITION:
        for image, answers in (("a", ("yes", "no")), ("b", ("yes", "yes" if kind == "count" else "no"))):
            metric.update(*case(answers[0], "Yes", image, kind))
            metric.update(*case(answers[1], "No", image, kind))
    got = scores(metric)
    assert got["perception (of 2000)"].value == pytest.approx(2000 - 25 - 50) and got["perception (of 2000)"].n == 40
    assert got["cognition (of 800)"].value == pytest.approx(800)
    assert got["accuracy:count"].value == pytest.approx(75)
    part = YesNo()
    part.update(*case("yes", "Yes", "a", "count"))
    assert not [name for name in scores(part) if "(of" in name]
