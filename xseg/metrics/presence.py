"""Whether the probability of a phrase says that the thing is there: "not present", calibrated (GRES; peers report N-acc
at one unnamed threshold)."""

from typing import Self

import numpy as np

from xseg.metrics.bootstrap import ratio, values_with_intervals
from xseg.types import Prediction, Sample, Score

BINS = 1000
"""Probabilities are counted in bins this fine, so that ranks merge and resamples are sums."""
COARSE = 10
"""Bins of the calibration error."""
LEVELS = (0.3, 0.5, 0.7)


class Presence:
    """N-acc and T-acc at three thresholds, AUC, calibration error and the best threshold, over phrases.

    Reads the score of a phrase's segment, the phrase's probability against the background, whatever its mask. Only
    reported where some phrases have a target and some have none.
    """

    def __init__(self) -> None:
        self.phrases: list[tuple[str, float, bool]] = []
        """(image, probability, there) per phrase."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count every phrase of a sample; one without a segment has probability 0, and a probability is no score."""
        for k, phrase in enumerate(sample.phrases):
            score = prediction.segments[k].score if k < len(prediction.segments) else 0.0
            self.phrases.append((str(sample.image_id), float(score), bool(phrase.instances)))
        return {}

    def __iadd__(self, other: Self) -> Self:
        self.phrases += other.phrases
        return self

    def compute(self) -> list[Score]:
        """All rows, or none without both kinds of phrase."""
        absent = sum(not there for _, _, there in self.phrases)
        if absent in (0, len(self.phrases)):
            return []
        images = {image: k for k, image in enumerate(dict.fromkeys(p[0] for p in self.phrases))}
        counts = np.zeros((len(images), 2, BINS))
        for image, score, there in self.phrases:
            counts[images[image], int(there), min(int(score * BINS), BINS - 1)] += 1
        values = values_with_intervals(counts.reshape(len(images), -1), _fold)
        present = len(self.phrases) - absent
        out = []
        for (name, protocol), (value, ci) in zip(_rows(), values, strict=True):
            n = absent if name.startswith("N-acc") else present if name.startswith("T-acc") else len(self.phrases)
            out.append(Score(name, value, n, protocol, ci))
        return out


def _rows() -> list[tuple[str, str]]:
    rows = [("presence AUC", "chance that a phrase with a target is likelier than one without; ties count half")]
    rows.append(("presence calibration error", f"{COARSE} bins: mean distance of probability and part that is there"))
    rows.append(("presence threshold", "least probability, in percent, that makes (N-acc + T-acc) / 2 largest"))
    for level in LEVELS:
        rows.append((f"N-acc@{level}", f"sentences without a target whose probability is below {level}"))
        rows.append((f"T-acc@{level}", f"sentences with a target whose probability is at least {level}"))
    return rows


def _fold(sums: np.ndarray) -> np.ndarray:
    absent, there = np.moveaxis(sums.reshape(*sums.shape[:-1], 2, BINS), -2, 0)
    below = np.cumsum(absent, axis=-1) - absent
    wins = (there * (below + absent / 2)).sum(-1)
    auc = ratio(wins, absent.sum(-1) * there.sum(-1))
    coarse = (*sums.shape[:-1], COARSE, BINS // COARSE)
    total, true = ((absent + there).reshape(coarse), there.reshape(coarse).sum(-1))
    said = (total * ((np.arange(BINS) + 0.5) / BINS).reshape(COARSE, -1)).sum(-1)
    error = ratio(np.abs(said - true).sum(-1), total.sum((-2, -1)))
    # rejected below threshold k / BINS, for every k
    refused = ratio(below, absent.sum(-1, keepdims=True))
    kept = ratio(np.cumsum(there[..., ::-1], axis=-1)[..., ::-1], there.sum(-1, keepdims=True))
    balance = refused + kept
    # the middle of the best thresholds, which are many where nothing lies between
    best = balance >= np.max(np.nan_to_num(balance), axis=-1, keepdims=True) - 1e-12
    middle = ratio((best * np.arange(BINS)).sum(-1), best.sum(-1)) / BINS
    places = [round(level * BINS) for level in LEVELS]
    levels = [v[..., k] for k in places for v in (refused, kept)]
    return 100 * np.stack([auc, error, middle, *levels], axis=-1)
