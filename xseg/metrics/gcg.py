"""Grounded captions (GLaMM; X-SAM section 4.2): are the words right, are the masks, and do they belong together?"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from hotcoco import mask as coco_mask

from xseg.metrics import captions, truth
from xseg.metrics.ap import AveragePrecision
from xseg.metrics.bootstrap import ratio, values_with_intervals
from xseg.types import Categories, Prediction, Sample, Score, Segment

IOU, WORDS = 0.5, 0.5
"""Recall: least IoU of the masks, and least overlap of the phrases."""
ANYTHING = Categories(("anything",), (1,), (True,))


@dataclass(frozen=True)
class Caption:
    """What is kept of one image, but its masks."""

    found: str
    reference: str
    miou: float
    """Mean IoU of the pairs of masks, 0..1."""
    hits: int
    """Annotated masks with a predicted one of their place and words."""
    annotated: int
    spans: int
    masked: int
    """Spans of the answer, and those of them with a mask that is not empty."""


class GroundedCaption:
    """METEOR, CIDEr, AP50, mIoU and recall, in percent (CIDEr up to 1000, as its authors count).

    A sample is right with ``turns`` that end in the reference caption and ``phrases`` with their instances; segments of
    the prediction are the masks of its spans, their labels the spans' words.
    """

    def __init__(self) -> None:
        self.captions: list[Caption] = []
        self.masks = AveragePrecision()

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count one image: its mIoU and recall."""
        found = compare(prediction, sample)
        self.captions.append(found)
        self.masks.add(*_without_classes(prediction, sample))
        return {"mIoU": 100 * found.miou, "recall": 100 * found.hits / max(1, found.annotated)}

    def __iadd__(self, other: Self) -> Self:
        self.captions += other.captions
        self.masks += other.masks
        return self

    def notes(self) -> list[str]:
        """What is left out and why."""
        missing = captions.missing_for_meteor()
        return [captions.WITHOUT_METEOR.format(missing=missing)] if missing else []

    def compute(self) -> list[Score]:
        """All scores; those of words need two captions, METEOR also Java."""
        if not self.captions:
            return []
        return self._words() + self._masks()

    def _words(self) -> list[Score]:
        pair = [c.found for c in self.captions], [c.reference for c in self.captions]
        n = len(self.captions)
        if n < 2:
            return []
        out = []
        if not captions.missing_for_meteor():
            whole, each = captions.meteor(*pair)
            protocol = "METEOR 1.5 of the whole set; interval of the mean over captions; one reference, own tokeniser"
            out.append(Score("METEOR", 100 * whole, n, protocol, _mean(each)[1]))
        protocol = "CIDEr-D, document frequencies of this set, mean over captions; one reference, own tokeniser"
        value, ci = _mean(captions.cider(*pair))
        return [*out, Score("CIDEr", value, n, protocol, ci)]

    def _masks(self) -> list[Score]:
        n = len(self.captions)
        protocol = "COCO segm IoU 0.50, all masks as one category, every score 1, the larger mask first"
        out = [dataclasses.replace(s, protocol=protocol) for s in self.masks.compute() if s.metric == "AP50"]
        rows: list[tuple[str, str, int, Callable[[Caption], tuple[float, float]]]] = [
            ("mIoU", "mean over images of the IoU of masks paired greedily, best first", n, lambda c: (c.miou, 1)),
            (
                "recall",
                f"annotated masks with a predicted one of IoU >= {IOU} whose phrase overlaps in words (F1 >= {WORDS}; "
                "GLaMM compares phrases by BERT instead)",
                sum(c.annotated for c in self.captions),
                lambda c: (c.hits, c.annotated),
            ),
            (
                "masked spans",
                "spans of the answers that have a mask, after generation",
                sum(c.spans for c in self.captions),
                lambda c: (c.masked, c.spans),
            ),
        ]
        for name, text, count, of in rows:
            counts = np.array([of(c) for c in self.captions], float)
            [(value, ci)] = values_with_intervals(counts, lambda sums: 100 * ratio(sums[..., :1], sums[..., 1:]))
            if count:
                out.append(Score(name, value, count, text, ci))
        return out


def compare(prediction: Prediction, sample: Sample) -> Caption:
    """Score one answer. Its spans are counted in the text, so that an answer without masks counts against it."""
    reference = next((t.text for t in reversed(sample.turns) if t.role == "assistant"), "")
    named = [(p.text, sample.instances[i].mask) for p in sample.phrases for i in p.instances]
    annotated = [(text, truth.rle(sample.masks, row)) for text, row in named if sample.masks is not None]
    found = [(s.label, dict(s.mask)) for s in prediction.segments if coco_mask.area(dict(s.mask))]
    overlap = np.zeros((len(found), len(annotated)))
    if overlap.size:
        overlap = np.asarray(coco_mask.iou([m for _, m in found], [m for _, m in annotated], [0] * len(annotated)))
    paired = _pairs(overlap, 0.0)
    likely = [overlap[a, b] for a, b in paired]
    same = np.array([[captions.word_f1(a, b) >= WORDS for b, _ in annotated] for a, _ in found]).reshape(overlap.shape)
    return Caption(
        found=captions.caption(prediction.text),
        reference=captions.caption(reference),
        miou=float(np.mean(likely)) if likely else 0.0,
        hits=len(_pairs(np.where(same, overlap, 0.0), IOU)),
        annotated=len(annotated),
        spans=prediction.text.count("</p>"),
        masked=len({s.category for s in prediction.segments if coco_mask.area(dict(s.mask))}),
    )


def _pairs(overlap: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Pair rows and columns of (a, b), the largest value first, none below ``least`` and none of 0."""
    left, out = overlap.copy(), []
    while left.size and left.max() > 0 and left.max() >= least:
        a, b = np.unravel_index(int(left.argmax()), left.shape)
        out.append((int(a), int(b)))
        left[a], left[:, b] = 0, 0
    return out


def _without_classes(prediction: Prediction, sample: Sample) -> tuple[Prediction, Sample]:
    """Both sides with one category and no scores, as AP50 of grounded captions wants it; larger masks stand first."""
    wanted = {i for phrase in sample.phrases for i in phrase.instances}
    instances = tuple(dataclasses.replace(sample.instances[i], category=0) for i in sorted(wanted))
    areas = [int(coco_mask.area(dict(s.mask))) for s in prediction.segments]
    order = sorted((k for k, area in enumerate(areas) if area), key=lambda k: -areas[k])
    segments = tuple(Segment(prediction.segments[k].mask, 0, 1.0) for k in order)
    bare: Mapping[str, Any] = {}
    return (
        dataclasses.replace(prediction, segments=segments, extra=bare),
        dataclasses.replace(sample, categories=ANYTHING, instances=instances),
    )


def _mean(scores: Sequence[float] | np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """Mean in percent and its interval."""
    counts = np.stack([np.asarray(scores, float), np.ones(len(scores))], 1)
    [found] = values_with_intervals(counts, lambda sums: 100 * ratio(sums[..., :1], sums[..., 1:]))
    return found
