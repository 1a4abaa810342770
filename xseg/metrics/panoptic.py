"""Panoptic quality (Kirillov et al. 2019) with the rules of panopticapi on crowd and void."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from xseg.metrics import truth
from xseg.metrics.bootstrap import mean_defined, ratio, values_with_intervals
from xseg.types import Categories, Prediction, Sample, Score

IOU, TP, FP, FN = range(4)


class PanopticQuality:
    """PQ, SQ and RQ over all, thing and stuff categories, in percent.

    ``unseen``: names of categories that get scores of their own ("PQ unseen"): those without a mask in training.
    """

    def __init__(self, unseen: Sequence[str] = ()) -> None:
        self.unseen = frozenset(unseen)
        self.categories: Categories | None = None
        self.counts: list[np.ndarray] = []
        """Per image (categories, 4): sum of matched IoU, TP, FP, FN."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count one image; a prediction without a map counts as all void.

        The image's own PQ takes all its segments as one category.
        """
        assert sample.categories is not None
        self.categories = sample.categories
        counts = count(prediction, sample)
        self.counts.append(counts)
        iou, tp, fp, fn = counts.sum(axis=0)
        whole = tp + (fp + fn) / 2
        return {"PQ": 100 * float(iou / whole)} if whole else {}

    def __iadd__(self, other: Self) -> Self:
        self.categories = self.categories or other.categories
        self.counts += other.counts
        return self

    def compute(self) -> list[Score]:
        """Scores over categories that occur in truth or prediction; groups without such a category are left out."""
        if self.categories is None:
            return []
        things = np.array(self.categories.is_thing, bool)
        groups = {"": np.ones_like(things), " things": things, " stuff": ~things}
        if self.unseen:
            groups[" unseen"] = np.array([name in self.unseen for name in self.categories.names])

        def fold(sums: np.ndarray) -> np.ndarray:
            per_class = sums.reshape(*sums.shape[:-1], len(things), 4)
            iou, tp, fp, fn = np.moveaxis(per_class, -1, 0)
            whole = tp + fp / 2 + fn / 2
            seen = whole > 0
            pq = ratio(iou, whole)
            sq = np.where(seen, np.where(tp > 0, iou / np.maximum(tp, 1), 0), np.nan)
            rq = ratio(tp, whole)
            return 100 * np.stack([mean_defined(v[..., g]) for g in groups.values() for v in (pq, sq, rq)], axis=-1)

        flat = np.stack(self.counts).reshape(len(self.counts), -1)
        names = [f"{metric}{group}" for group in groups for metric in ("PQ", "SQ", "RQ")]
        protocol = "panopticapi: match at IoU > 0.5, crowd and void ignored, mean over categories that occur"
        if self.unseen:
            protocol += f"; unseen, without a mask in training: {', '.join(sorted(self.unseen))}"
        found = zip(names, values_with_intervals(flat, fold), strict=True)
        return [Score(name, v, len(self.counts), protocol, ci) for name, (v, ci) in found if not np.isnan(v)]


def count(prediction: Prediction, sample: Sample) -> np.ndarray:
    """Return (categories, 4) sums of one image: IoU of matches, TP, FP, FN."""
    assert sample.categories is not None
    joint = overlaps(prediction, sample)
    true_area, found_area, void = joint.sum(axis=1).tolist(), joint.sum(axis=0).tolist(), joint[0].tolist()
    sums = np.zeros((len(sample.categories.names), 4))
    ignored, true_hits, found_hits = list(void), set(), set()
    named: dict[int, list[int]] = {}
    for b, found in enumerate(prediction.segments):
        named.setdefault(found.category, []).append(b)
    for a, true in enumerate(sample.instances):
        for b in named.get(true.category, ()):
            inter = int(joint[a + 1, b + 1])
            if true.is_crowd:
                ignored[b + 1] += inter
                continue
            union = true_area[a + 1] + found_area[b + 1] - inter - void[b + 1]
            if 2 * inter > union:
                sums[true.category, IOU] += inter / union
                sums[true.category, TP] += 1
                true_hits.add(a)
                found_hits.add(b)
        if true_area[a + 1] and not true.is_crowd and a not in true_hits:
            sums[true.category, FN] += 1
    for b, found in enumerate(prediction.segments):
        if found_area[b + 1] and b not in found_hits and 2 * ignored[b + 1] <= found_area[b + 1]:
            sums[found.category, FP] += 1
    return sums


def overlaps(prediction: Prediction, sample: Sample) -> np.ndarray:
    """Return (1 + instances, 1 + segments) int64 pixels that each pair shares; row and column 0 = void."""
    found = np.zeros(truth.size_of(sample), np.int32) if prediction.panoptic is None else prediction.panoptic
    true, found, lengths = truth.against(sample, found)
    rows, columns = len(sample.instances) + 1, len(prediction.segments) + 1
    # counted as floats, which are exact far beyond the pixels of a picture
    counts = np.bincount(true * columns + found, lengths, rows * columns)
    return counts.astype(np.int64).reshape(rows, columns)
