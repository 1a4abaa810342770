"""Calibrated "not present" by hand."""

import pytest

from xseg.metrics import truth
from xseg.metrics.presence import Presence
from xseg.types import Phrase, Prediction, Sample, Score, Segment

EMPTY = truth.encode([[False]])  # type: ignore[arg-type]


def scored(*rows: list[tuple[float, bool]]) -> Presence:
    """One sample per row of (probability, there)."""
    metric = Presence()
    for k, row in enumerate(rows):
        phrases = tuple(Phrase(str(i), (0,) if there else ()) for i, (_, there) in enumerate(row))
        sample = Sample(f"s{k}", (), (1, 1), phrases=phrases, image_id=k)
        metric.update(Prediction("s", tuple(Segment(EMPTY, 0, score) for score, _ in row)), sample)
    return metric


def values(metric: Presence) -> dict[str, Score]:
    return {s.metric: s for s in metric.compute()}


ROWS = ([(0.9, True), (0.45, True)], [(0.6, True), (0.2, False)], [(0.55, False), (0.1, False), (0.35, True)])


def test_by_hand() -> None:
    got = values(scored(*ROWS))
    # 4 with a target, 3 without: of 12 pairs .45 and .35 lose to .55
    assert got["presence AUC"].value == pytest.approx(100 * 10 / 12) and got["presence AUC"].n == 7
    acc = {name: (s.value, s.n) for name, s in got.items() if "acc" in name}
    assert acc == {
        "N-acc@0.3": (pytest.approx(200 / 3), 3),
        "T-acc@0.3": (100, 4),
        "N-acc@0.5": (pytest.approx(200 / 3), 3),
        "T-acc@0.5": (50, 4),
        "N-acc@0.7": (100, 3),
        "T-acc@0.7": (25, 4),
    }
    assert 20 < got["presence threshold"].value < 35, "between .2 and .35 both accuracies together are best"
    # bins of a tenth: .1 .1, .2 .2, .35 -.65, .45 -.55, (.6) -.4, .55 .55, .9 -.1, and half a fine bin each
    assert got["presence calibration error"].value == pytest.approx(
        100 * (0.1 + 0.2 + 0.65 + 0.55 + 0.4 + 0.55 + 0.1) / 7, abs=0.06
    )
    assert all(s.ci95 for s in got.values())


def test_ties_count_half_and_perfect_is_perfect() -> None:
    assert values(scored([(0.5, True), (0.5, False)]))["presence AUC"].value == 50
    perfect = values(scored([(1.0, True), (0.0, False)], [(1.0, True)]))
    assert perfect["presence AUC"].value == perfect["N-acc@0.7"].value == perfect["T-acc@0.7"].value == 100
    assert perfect["presence calibration error"].value < 0.06


def test_nothing_without_both_kinds_of_phrase() -> None:
    assert (
        scored([(0.5, True)], [(0.1, True)]).compute() == scored([(0.5, False)]).compute() == Presence().compute() == []
    )


def test_a_missing_segment_has_probability_zero_and_halves_merge() -> None:
    metric = Presence()
    assert metric.update(Prediction("s"), Sample("s", (), (1, 1), phrases=(Phrase("a", (0,)), Phrase("b")))) == {}
    assert values(metric)["T-acc@0.3"].value == 0 and values(metric)["N-acc@0.3"].value == 100
    whole, left = scored(*ROWS), scored(*ROWS[:2])
    right = Presence()
    right.phrases = whole.phrases[len(left.phrases) :]
    left += right
    assert left.compute() == whole.compute()
