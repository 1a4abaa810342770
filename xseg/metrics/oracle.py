"""Generation error and selection error: the best of all the decoder's masks against the one that was chosen."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from xseg.metrics import truth
from xseg.metrics.bootstrap import ratio, values_with_intervals
from xseg.types import Prediction, Sample, Score

SIZES = (("small", 32**2), ("medium", 96**2), ("large", 1 << 62))
"""COCO's sizes: name and the area in pixels below which a target has it."""
WORDS = (("1-2 words", 2), ("3-5 words", 5), ("6+ words", 1 << 30))
"""Phrase lengths: name and the most words."""
MOST_GROUPS = 20
"""Categories (or kinds of phrase) that get a row of their own: the commonest."""
PROTOCOL = {
    "oracle IoU": "mean over targets of the IoU of the best of all the decoder's masks (generation)",
    "chosen IoU": "mean over targets of the IoU of the mask that was given out",
    "selection gap": "oracle IoU - chosen IoU (selection)",
}


@dataclass(frozen=True)
class Target:
    """One thing that should have been segmented."""

    mask: Mapping[str, Any]
    """RLE in original pixels."""
    group: str = ""
    """Category, or kind of phrase."""
    words: int = 0
    """Length of the phrase that names it; 0 = no phrase."""


@dataclass(frozen=True)
class Pair:
    """What is kept of a target: IoU in 0..1 of the chosen and of the best mask, which is never worse."""

    group: str
    words: int
    area: int
    chosen: float
    best: float


def pairs(
    sample: Sample,
    targets: Sequence[Target],
    chosen: Sequence[Mapping[str, Any] | None],
    nearest: Sequence[Mapping[str, Any]],
) -> tuple[Pair, ...]:
    """Compare each target with the mask given out for it (None = none) and with the nearest of all masks.

    Pixels of ``sample.ignore`` are left out; a target that lies in them altogether is no target.
    """
    keep = None if sample.ignore is None else ~truth.decode(sample.ignore)
    out = []
    for target, given, near in zip(targets, chosen, nearest, strict=True):
        true = truth.decode(target.mask)
        true = true if keep is None else true & keep
        if not true.any():
            continue
        found = 0.0 if given is None else _iou(true, truth.decode(given), keep)
        best = max(found, _iou(true, truth.decode(near), keep))
        out.append(Pair(target.group, target.words, int(true.sum()), found, best))
    return tuple(out)


def _iou(true: np.ndarray, found: np.ndarray, keep: np.ndarray | None) -> float:
    found = found if keep is None else found & keep
    return float((true & found).sum() / (true | found).sum())


class OracleGap:
    """Mean IoU of the best and of the chosen masks in percent, by size, by length of the phrase and by category.

    Tasks put their ``pairs`` into ``Prediction.extra["oracle"]``; predictions without them, such as those of a blind
    baseline, do not count.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[str, Pair]] = []
        """(image, pair) per target."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Take the pairs of one sample: the oracle IoU and the gap over its targets."""
        found: Sequence[Pair] = prediction.extra.get("oracle", ())
        if not found:
            return {}
        self.pairs += [(str(sample.image_id), pair) for pair in found]
        best, chosen = (float(np.mean(v)) for v in ([p.best for p in found], [p.chosen for p in found]))
        return {"oracle IoU": 100 * best, "selection gap": 100 * (best - chosen)}

    def __iadd__(self, other: Self) -> Self:
        self.pairs += other.pairs
        return self

    def compute(self) -> list[Score]:
        """Three rows over all targets, then the oracle IoU and the gap of every group that occurs."""
        out = self._scores(lambda _: True, "", tuple(PROTOCOL))
        low = 0
        for name, limit in SIZES:
            out += self._scores(lambda p, a=low, b=limit: a <= p.area < b, f":{name}")  # type: ignore[misc]
            low = limit
        low = 0
        for name, limit in WORDS:
            out += self._scores(lambda p, a=low, b=limit: a < p.words <= b, f":{name}")  # type: ignore[misc]
            low = limit
        groups = Counter(p.group for _, p in self.pairs if p.group)
        for group, _ in sorted(groups.most_common(MOST_GROUPS)) if len(groups) > 1 else ():
            out += self._scores(lambda p, g=group: p.group == g, f":{group}")  # type: ignore[misc]
        return out

    def _scores(
        self, wanted: Callable[[Pair], bool], suffix: str, names: tuple[str, ...] = ("oracle IoU", "selection gap")
    ) -> list[Score]:
        found = [(image, p) for image, p in self.pairs if wanted(p)]
        if not found:
            return []
        images = {image: k for k, image in enumerate(dict.fromkeys(image for image, _ in found))}
        counts = np.zeros((len(images), 3))
        for image, p in found:
            counts[images[image]] += [p.best, p.chosen, 1]

        def fold(sums: np.ndarray) -> np.ndarray:
            best, chosen = (ratio(sums[..., k], sums[..., 2]) for k in (0, 1))
            columns = {"oracle IoU": best, "chosen IoU": chosen, "selection gap": best - chosen}
            return 100 * np.stack([columns[name] for name in names], axis=-1)

        values = zip(names, values_with_intervals(counts, fold), strict=True)
        return [Score(name + suffix, value, len(found), PROTOCOL[name], ci) for name, (value, ci) in values]
