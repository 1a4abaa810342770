"""Confidence intervals by resampling images, and what every metric shares in reporting its numbers."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000

Fold = Callable[[np.ndarray], np.ndarray]
"""Per-image counts summed over images (..., d) -> values (..., m) in percent; NaN where undefined."""


def values_with_intervals(counts: np.ndarray, fold: Fold) -> list[tuple[float, tuple[float, float] | None]]:
    """Return m (value, 95 % interval) of additive per-image counts (n, d).

    Images are drawn with replacement, 1000 times, always with the same seed. No interval below 2 images.
    """
    values = fold(counts.sum(axis=0))
    images = len(counts)
    if images < 2:
        return [(float(v), None) for v in values]
    rng = np.random.default_rng(0)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    drawn = fold(weights.astype(np.float64) @ counts)
    return [(float(v), interval(drawn[:, k])) for k, v in enumerate(values)]


def interval(drawn: np.ndarray) -> tuple[float, float] | None:
    """Return the central 95 % of the defined values, or None when a value is rarely defined."""
    defined = drawn[~np.isnan(drawn)]
    if len(defined) < len(drawn) / 2:
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole > 0)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis=-1), defined.sum(axis=-1))
