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

    def update(self, prediction: Prediction, sample: Sample) -> None:
        """Count one image; a prediction without a map counts as all void."""
        assert sample.categories is not None
        self.categories = sample.categories
        self.counts.append(count(prediction, sample))

    def __iadd__(self, other: Self) -> Self:
        self.categories = self.categories or other.categories
        self.counts += other.counts
        return self

    def per_sample(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """PQ of one image, all its segments as one category."""
        iou, tp, fp, fn = count(prediction, sample).sum(axis=0)
        whole = tp + (fp + fn) / 2
        return {"PQ": 100 * float(iou / whole)} if whole else {}

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
    true_map = truth.segment_map(sample)
    found_map = np.zeros_like(true_map) if prediction.panoptic is None else prediction.panoptic
    if found_map.shape != true_map.shape:
        raise ValueError(f"{sample.key}: panoptic map is {found_map.shape}, the annotation is {true_map.shape}")
    rows, columns = len(sample.instances) + 1, len(prediction.segments) + 1
    joint = np.bincount((true_map.astype(np.int64) * columns + found_map).ravel(), minlength=rows * columns)
    joint = joint.reshape(rows, columns)
    void, inter = joint[0, 1:], joint[1:, 1:]
    true_area, found_area = joint[1:].sum(axis=1), joint[:, 1:].sum(axis=0)
    true_class = np.array([i.category for i in sample.instances], np.int64)
    crowd = np.array([i.is_crowd for i in sample.instances], bool)
    found_class = np.array([s.category for s in prediction.segments], np.int64)

    same = true_class[:, None] == found_class[None]
    iou = ratio(inter.astype(float), true_area[:, None] + found_area - inter - void)
    hit = same & ~crowd[:, None] & (np.nan_to_num(iou) > 0.5)
    out = np.zeros((len(sample.categories.names), 4))
    true_hit, found_hit = np.nonzero(hit)
    np.add.at(out[:, IOU], true_class[true_hit], iou[true_hit, found_hit])
    np.add.at(out[:, TP], true_class[true_hit], 1)
    missed = ~hit.any(axis=1) & ~crowd & (true_area > 0)
    np.add.at(out[:, FN], true_class[missed], 1)
    ignored = void + np.where(same & crowd[:, None], inter, 0).sum(axis=0)
    wrong = ~hit.any(axis=0) & (found_area > 0) & (ignored <= found_area / 2)
    np.add.at(out[:, FP], found_class[wrong], 1)
    return out
