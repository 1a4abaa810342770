"""Mean intersection over union of category maps."""

from typing import Self

import numpy as np

from xseg.metrics import truth
from xseg.metrics.bootstrap import mean_defined, ratio, values_with_intervals
from xseg.types import Prediction, Sample, Score


class MeanIoU:
    """mIoU in percent over the categories that occur in the truth; unannotated pixels do not count."""

    def __init__(self) -> None:
        self.counts: list[np.ndarray] = []
        """Per image (categories, 3): intersection, predicted and true pixels."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count one image: its own mIoU; a prediction without a map has no pixel of any category."""
        counts = count(prediction, sample)
        self.counts.append(counts)
        value = float(_fold(counts.ravel())[0])
        return {} if np.isnan(value) else {"mIoU": value}

    def __iadd__(self, other: Self) -> Self:
        self.counts += other.counts
        return self

    def compute(self) -> list[Score]:
        """One score, or none without any annotated pixel."""
        if not self.counts:
            return []
        flat = np.stack(self.counts).reshape(len(self.counts), -1)
        [(value, ci)] = values_with_intervals(flat, _fold)
        protocol = "confusion over all images, mean over categories in the truth, void pixels ignored, crowd counted"
        return [] if np.isnan(value) else [Score("mIoU", value, len(self.counts), protocol, ci)]


def count(prediction: Prediction, sample: Sample) -> np.ndarray:
    """Return (categories, 3) pixels of one image: intersection, predicted, true."""
    assert sample.categories is not None
    classes = len(sample.categories.names)
    none = np.full(truth.size_of(sample), -1, np.int32)
    instances, found, lengths = truth.against(sample, none if prediction.semantic is None else prediction.semantic)
    true = np.array([-1, *(i.category for i in sample.instances)], np.int64).take(instances)
    known = true >= 0
    columns = ((true, known & (true == found)), (found, known & (found >= 0)), (true, known))
    # counted as floats, which are exact far beyond the pixels of a picture
    return np.stack([np.bincount(c[some], lengths[some], classes) for c, some in columns], axis=-1)


def _fold(sums: np.ndarray) -> np.ndarray:
    inter, found, true = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    iou = np.where(true > 0, ratio(inter, found + true - inter), np.nan)
    return 100 * mean_defined(iou)[..., None]
