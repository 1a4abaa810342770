"""J and F of objects in clips (Perazzi et al. 2016, the DAVIS benchmark; Pont-Tuset et al. 2017 where there are
several objects)."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage

from xseg.metrics import truth
from xseg.metrics.bootstrap import mean_defined, values_with_intervals
from xseg.types import Prediction, Sample, Score

TOLERANCE = 0.008
"""How far two outlines may lie apart and still agree, as a part of the picture's diagonal."""
PROTOCOL = {
    "J": "IoU of an object's masks",
    "F": f"F-measure of their outlines, which agree within {TOLERANCE} of the diagonal",
    "J&F": "mean of J and F",
}


@dataclass(frozen=True)
class Frame:
    """What is kept of one object in one frame."""

    clip: str
    object: str
    j: float
    f: float


class RegionAndOutline:
    """J, F and J&F in percent: mean over the frames of an object, then over objects.

    A phrase's ``id`` is the object, ``Sample.kind`` the clip, the segment of the same place its mask; pixels of
    ``Sample.ignore`` are left out. DAVIS itself leaves out the first and the last frame of a clip, which are no samples
    then.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count every object of one frame: the mean J&F over them; a missing segment is empty."""
        found = frames(prediction, sample)
        self.frames += found
        return {"J&F": 50 * float(np.mean([o.j + o.f for o in found]))} if found else {}

    def __iadd__(self, other: Self) -> Self:
        self.frames += other.frames
        return self

    def compute(self) -> list[Score]:
        """Three scores over objects; intervals by resampling clips."""
        if not self.frames:
            return []
        objects: dict[tuple[str, str], list[Frame]] = {}
        for frame in self.frames:
            objects.setdefault((frame.clip, frame.object), []).append(frame)
        clips = {clip: k for k, clip in enumerate(dict.fromkeys(f.clip for f in self.frames))}
        counts = np.zeros((len(clips), 3))
        for (clip, _), found in objects.items():
            counts[clips[clip]] += [np.mean([o.j for o in found]), np.mean([o.f for o in found]), 1]

        def fold(sums: np.ndarray) -> np.ndarray:
            j, f = (sums[..., k] / sums[..., 2] for k in (0, 1))
            return 100 * np.stack([j, f, mean_defined(np.stack([j, f], axis=-1))], axis=-1)

        text = (
            f"mean over the frames of each of {len(objects)} objects, then over objects; every annotated frame counts"
        )
        values = zip(PROTOCOL.items(), values_with_intervals(counts, fold), strict=True)
        return [Score(name, value, len(self.frames), f"{what}; {text}", ci) for (name, what), (value, ci) in values]


def frames(prediction: Prediction, sample: Sample) -> list[Frame]:
    """J and F of every phrase of a sample."""
    size = truth.size_of(sample)
    keep = None if sample.ignore is None else ~truth.decode(sample.ignore)
    out = []
    for k, phrase in enumerate(sample.phrases):
        true = truth.union(sample.masks, [sample.instances[i].mask for i in phrase.instances], size)
        found = truth.decode(prediction.segments[k].mask) if k < len(prediction.segments) else np.zeros(size, bool)
        if keep is not None:
            true, found = true & keep, found & keep
        out.append(Frame(sample.kind, phrase.id, region(true, found), outline(true, found)))
    return out


def region(true: np.ndarray, found: np.ndarray) -> float:
    """IoU in 0..1 of two (H, W) bool masks; two empty ones agree."""
    union = int((true | found).sum())
    return int((true & found).sum()) / union if union else 1.0


def outline(true: np.ndarray, found: np.ndarray) -> float:
    """F-measure in 0..1 of the outlines of two (H, W) bool masks; two empty ones agree."""
    true, found = edges(true), edges(found)
    if not true.any() or not found.any():
        return float(true.any() == found.any())
    reach = math.ceil(TOLERANCE * math.hypot(*true.shape))
    # within a disc of the other outline: its distance to the nearest outline pixel is at most the disc's radius
    precision = (ndimage.distance_transform_edt(~true)[found] <= reach).mean()
    recall = (ndimage.distance_transform_edt(~found)[true] <= reach).mean()
    both = precision + recall
    return float(2 * precision * recall / both) if both else 0.0


def edges(mask: np.ndarray) -> np.ndarray:
    """The (H, W) bool outline: pixels that differ from the one to the right, below, or both; one pixel wide."""
    right, below = np.pad(mask, ((0, 0), (0, 1)), mode="edge")[:, 1:], np.pad(mask, ((0, 1), (0, 0)), mode="edge")[1:]
    both = np.pad(mask, ((0, 1), (0, 1)), mode="edge")[1:, 1:]
    return (mask != right) | (mask != below) | (mask != both)
