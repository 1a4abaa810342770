"""The oracle gap by hand, and the search for the nearest of the decoder's masks."""

import dataclasses

import numpy as np
import pytest
import torch

from xseg import postprocess
from xseg.geometry.masks import decode, encode, iou
from xseg.metrics import truth
from xseg.metrics.oracle import OracleGap, Pair, Target, pairs
from xseg.types import Prediction, Sample, ViewGeometry

SIZE = (1, 20)
SAMPLE = Sample("s", (), SIZE, image_id=1)


def line(start: int, end: int) -> dict[str, object]:
    dense = np.zeros(SIZE, bool)
    dense[0, start:end] = True
    return truth.encode(dense)


def test_pairs_by_hand() -> None:
    targets = [Target(line(0, 10), "a", 2), Target(line(10, 14), "b")]
    first, second = pairs(SAMPLE, targets, [line(0, 5), None], [line(0, 8), line(10, 14)])
    assert first == Pair("a", 2, 10, 0.5, 0.8) and second == Pair("b", 0, 4, 0.0, 1.0)
    (better,) = pairs(SAMPLE, targets[:1], [line(0, 9)], [line(0, 8)])
    assert better.best == better.chosen == 0.9, "the best of all is never worse than the chosen one"


def test_ignored_pixels_leave_both_sides() -> None:
    sample = dataclasses.replace(SAMPLE, ignore=line(5, 12))
    (only,) = pairs(sample, [Target(line(0, 10)), Target(line(6, 9))], [line(0, 12), None], [line(0, 4), line(0, 1)])
    assert only == Pair("", 0, 5, 1.0, 1.0), "a target of ignored pixels alone is none"


def scored(*rows: tuple[Pair, ...]) -> OracleGap:
    metric = OracleGap()
    for k, found in enumerate(rows):
        metric.update(Prediction("s", extra={"oracle": found}), dataclasses.replace(SAMPLE, image_id=k))
    return metric


def test_rows_by_hand() -> None:
    small, large = Pair("cat", 2, 100, 0.2, 0.8), Pair("dog", 7, 10000, 0.5, 0.6)
    metric = scored((small, large), (Pair("cat", 4, 2000, 1.0, 1.0),))
    got = {s.metric: s for s in metric.compute()}
    assert got["oracle IoU"].value == pytest.approx(100 * 2.4 / 3) and got["oracle IoU"].n == 3
    assert got["chosen IoU"].value == pytest.approx(100 * 1.7 / 3)
    assert got["selection gap"].value == pytest.approx(100 * 0.7 / 3)
    assert got["selection gap:small"].value == pytest.approx(60) and got["selection gap:large"].value == pytest.approx(
        10
    )
    assert got["oracle IoU:medium"].value == 100 and got["oracle IoU:medium"].n == 1
    assert got["selection gap:1-2 words"].n == got["selection gap:3-5 words"].n == got["selection gap:6+ words"].n == 1
    assert got["oracle IoU:cat"].value == pytest.approx(90) and got["oracle IoU:dog"].n == 1
    assert all(0 <= low <= high <= 100 for s in got.values() if s.ci95 for low, high in [s.ci95])
    assert metric.update(Prediction("s", extra={"oracle": (small,)}), SAMPLE) == {
        "oracle IoU": 80,
        "selection gap": pytest.approx(60),
    }


def test_predictions_without_pairs_do_not_count() -> None:
    assert scored(()).compute() == [] and OracleGap().update(Prediction("s"), SAMPLE) == {}
    one = {s.metric for s in scored((Pair("", 0, 9, 1, 1),)).compute()}
    assert one == {"oracle IoU", "chosen IoU", "selection gap", "oracle IoU:small", "selection gap:small"}


def test_merge() -> None:
    rows = [(Pair("a", k, 50 * k + 1, k / 10, 0.9),) for k in range(8)]
    whole, left, right = scored(*rows), scored(*rows[:3]), OracleGap()
    for k, found in enumerate(rows[3:], start=3):
        right.update(Prediction("s", extra={"oracle": found}), dataclasses.replace(SAMPLE, image_id=k))
    left += right
    assert left.compute() == whole.compute()


def test_the_nearest_mask_is_found_on_the_grid() -> None:
    """Blocks on a 16 x 16 grid of a 64 pixel canvas that shows an image of 48 x 96 pixels at scale 2/3."""
    g = ViewGeometry((48, 96), (32, 64), 64)
    masks = torch.full((4, 16, 16), -20.0)
    masks[0, 0:4, 0:4] = masks[1, 0:4, 8:16] = masks[2, 2:8, 0:8] = 20.0
    masks[3, 8:, :] = 20.0  # lies in the padding alone
    truths = []
    for top, left, bottom, right in ((0, 0, 24, 24), (0, 50, 24, 96), (13, 0, 48, 50)):
        dense = np.zeros((48, 96), bool)
        dense[top:bottom, left:right] = True
        truths.append(encode(dense))
    found = postprocess.nearest(masks, g, truths)
    every = postprocess.to_original(masks, g).numpy() > 0
    for k, (mask, true) in enumerate(zip(found, truths, strict=True)):
        assert (decode(mask) == every[k]).all()
        assert iou(mask, true) == max(iou(encode(m), true) for m in every) > 0.8
    assert postprocess.nearest(masks, g, []) == []
