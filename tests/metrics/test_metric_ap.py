"""AP equals pycocotools on crowded random scenes, and the interval is that of resampled images."""

import contextlib
import io
import time

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from xseg.metrics import truth
from xseg.metrics.ap import AveragePrecision, annotations
from xseg.types import Categories, Instance, Masks, Prediction, Sample, Segment

CATEGORIES = Categories(("cat", "dog", "grass", "sheep"), (3, 5, 9, 11), (True, True, False, True))


def scene(rng: np.random.Generator, key: str, things: int = 5) -> tuple[Sample, Prediction]:
    masks, instances, segments = [], [], []
    for k in range(things):
        y, x, h, w = (int(v) for v in rng.integers((0, 0, 6, 6), (30, 40, 20, 24)))
        dense = np.zeros((40, 50), bool)
        dense[y : y + h, x : x + w] = True
        category = int(rng.integers(4))
        masks.append(truth.encode(dense))
        instances.append(Instance(k, category, is_crowd=bool(rng.random() < 0.25)))
        for _ in range(int(rng.integers(0, 3))):
            guess = category if rng.random() < 0.8 else int(rng.integers(4))
            moved = np.roll(dense, tuple(rng.integers(-3, 4, 2)), (0, 1))
            segments.append(Segment(truth.encode(moved), guess, float(rng.random())))
    found = tuple(s for s in segments if CATEGORIES.is_thing[s.category])
    sample = Sample(key, (), (40, 50), Masks((40, 50), tuple(masks)), tuple(instances), CATEGORIES)
    return sample, Prediction(key, extra={"instances": found})


def reference(pairs: list[tuple[Sample, Prediction]]) -> np.ndarray:
    rows = [(k + 1, a) for k, (s, _) in enumerate(pairs) for a in annotations(s)]
    found = [(k + 1, s) for k, (_, p) in enumerate(pairs) for s in p.extra["instances"]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": k + 1, "height": 40, "width": 50} for k in range(len(pairs))],
            "annotations": [{**a, "id": n + 1, "image_id": k} for n, (k, a) in enumerate(rows)],
            "categories": [{"id": k, "name": CATEGORIES.names[k]} for k in (0, 1, 3)],
        }
        coco.createIndex()
        results = [
            {"image_id": k, "category_id": s.category, "segmentation": dict(s.mask), "score": s.score} for k, s in found
        ]
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_equals_pycocotools_with_crowd() -> None:
    rng = np.random.default_rng(0)
    pairs = [scene(rng, str(k)) for k in range(30)]
    assert any(i.is_crowd for s, _ in pairs for i in s.instances)
    metric = AveragePrecision()
    for sample, prediction in pairs:
        metric.update(prediction, sample)
    got = {s.metric: s for s in metric.compute()}
    want = reference(pairs)
    assert got["AP"].value == pytest.approx(100 * want[0], abs=1e-9)
    assert got["AP50"].value == pytest.approx(100 * want[1], abs=1e-9)
    assert 0 < want[0] < want[1] < 1
    for score in got.values():
        assert score.ci95 is not None and score.ci95[0] < score.value < score.ci95[1]


def test_id_maps_give_the_same_annotations_as_rles() -> None:
    id_map = np.zeros((6, 8), np.int32)
    id_map[1:3, 2:5], id_map[4:, :3] = 300, 70000
    instances = (Instance(0, 0), Instance(1, 3))
    by_map = Sample("m", (), (6, 8), Masks((6, 8), id_map=id_map, ids=(300, 70000)), instances, CATEGORIES)
    rles = tuple(truth.encode(id_map == i) for i in (300, 70000))
    by_rle = Sample("m", (), (6, 8), Masks((6, 8), rles), instances, CATEGORIES)
    assert annotations(by_map) == annotations(by_rle)
    assert annotations(by_map)[0]["area"] == 6 and annotations(by_map)[0]["bbox"] == [2, 1, 3, 2]
    told = []
    for sample in (by_map, by_rle):
        metric, whole = AveragePrecision(resamples=0), AveragePrecision(resamples=0)
        metric.update(Prediction("m"), sample)
        whole += metric
        told.append(["do not overlap" in score.protocol for score in whole.compute()])
    assert told == [[True, True], [False, False]], "COCO's own AP is counted on masks that may"


def test_no_detection_scores_zero_and_no_truth_scores_nothing() -> None:
    sample, _ = scene(np.random.default_rng(1), "a")
    metric = AveragePrecision()
    metric.update(Prediction("a"), sample)
    assert [s.value for s in metric.compute()] == [0, 0]
    bare = AveragePrecision()
    bare.update(Prediction("a"), Sample("b", (), (40, 50), Masks((40, 50)), (), CATEGORIES))
    assert bare.compute() == [] and AveragePrecision().compute() == []


def test_merge_and_recall_per_sample() -> None:
    rng = np.random.default_rng(2)
    pairs = [scene(rng, str(k)) for k in range(8)]
    whole, left, right = AveragePrecision(), AveragePrecision(), AveragePrecision()
    for k, (sample, prediction) in enumerate(pairs):
        whole.update(prediction, sample)
        (left if k < 4 else right).update(prediction, sample)
    left += right
    assert [s.value for s in left.compute()] == [s.value for s in whole.compute()]
    sample, _ = pairs[0]
    perfect = tuple(Segment(a["segmentation"], a["category_id"]) for a in annotations(sample) if not a["iscrowd"])
    assert whole.update(Prediction("x", perfect), sample) == {"recall50": 100}
    assert whole.update(Prediction("x", perfect[1:]), sample) == {"recall50": 100 * (len(perfect) - 1) / len(perfect)}
    assert whole.update(Prediction("x"), sample) == {"recall50": 0}


def test_the_interval_is_cheap() -> None:
    rng = np.random.default_rng(3)
    metric = AveragePrecision()
    for k in range(200):
        sample, prediction = scene(rng, str(k))
        metric.update(prediction, sample)
    start = time.perf_counter()
    metric.compute()
    assert time.perf_counter() - start < 20
