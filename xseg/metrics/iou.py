"""Scores of one mask per phrase: cIoU, gIoU, precision at k, and whether absent things are refused (GRES)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from xseg.errors import UserError
from xseg.metrics import truth
from xseg.metrics.bootstrap import ratio, values_with_intervals
from xseg.types import Prediction, Sample, Score

LEVELS = (0.5, 0.7, 0.9)
PROTOCOL = {
    "cIoU": "sum of intersections / sum of unions over sentences",
    "gIoU": "mean IoU over sentences; nothing predicted where nothing is counts 1",
    "P@0.5": "part of the sentences with a target whose IoU is at least 0.5",
    "P@0.7": "part of the sentences with a target whose IoU is at least 0.7",
    "P@0.9": "part of the sentences with a target whose IoU is at least 0.9",
    "N-acc": "part of the sentences without a target that get an empty mask",
    "T-acc": "part of the sentences with a target that get a non-empty mask",
}


@dataclass(frozen=True)
class Sentence:
    """What is kept of one phrase."""

    image: str
    kind: str
    inter: int
    union: int
    target: bool
    """Whether the phrase names anything in the image."""
    found: bool
    """Whether the predicted mask has a pixel."""

    @property
    def iou(self) -> float:
        """Two empty masks agree."""
        return self.inter / self.union if self.union else 1.0


class PhraseIoU:
    """Scores per sentence, in percent, over all sentences and per kind of phrase (``cIoU:relation``).

    ``unit``: what a phrase of the samples is, for names and protocol: one "sentence", one "reference" with all its
    sentences merged, or an "object" that a prompt points at. ``note`` is put behind the protocol: how the masks were
    asked for.
    """

    def __init__(self, unit: Literal["sentence", "reference", "object"] = "sentence", note: str = "") -> None:
        self.unit, self.note = unit, note
        self.sentences: list[Sentence] = []
        self.references: dict[tuple[str, str], str] = {}
        """(image, reference) -> key of its sample, where a phrase is a whole reference."""
        self.together = False
        """Whether a sample had several phrases: they are turns of one conversation."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count every phrase of a sample against the segment of the same place; a missing segment is empty.

        The sample's own score is the mean IoU over its phrases.
        """
        found = sentences(prediction, sample)
        self.sentences += found
        self.together |= len(found) > 1
        if self.unit == "reference":
            self._claim({(str(sample.image_id), phrase.id): sample.key for phrase in sample.phrases})
        name = "mIoU" if self.unit == "object" else "gIoU"
        return {name: 100 * float(np.mean([s.iou for s in found]))} if found else {}

    def __iadd__(self, other: Self) -> Self:
        self.sentences += other.sentences
        self.together |= other.together
        self._claim(other.references)
        return self

    def _claim(self, found: Mapping[tuple[str, str], str]) -> None:
        """UserError for a reference of which another sample has sentences too: they would count apart."""
        for (image, reference), key in found.items():
            if self.references.setdefault((image, reference), key) != key:
                raise UserError(
                    f"{key}: sentences of reference {reference} stand in {self.references[image, reference]} too, and "
                    "sentences: merged makes one phrase of all: give the recipe's source grouping: reference"
                )

    def compute(self) -> list[Score]:
        """All scores, then cIoU and gIoU per kind; scores without a sentence are left out."""
        scores = self._scores(self.sentences, tuple(PROTOCOL), "")
        kinds = sorted({s.kind for s in self.sentences} - {""})
        for kind in kinds if len(kinds) > 1 else []:
            scores += self._scores([s for s in self.sentences if s.kind == kind], ("cIoU", "gIoU"), f":{kind}")
        return scores

    def _scores(self, found: list[Sentence], names: tuple[str, ...], suffix: str) -> list[Score]:
        scores = _scores(found, names, suffix)
        if self.unit == "object":
            # the literature's name for it where objects are pointed at; that an object is there goes without saying
            kept = [s for s in scores if not s.metric.endswith("-acc")]
            note = f"; {self.note}" if self.note else ""
            words = [
                (s.metric.replace("gIoU", "mIoU"), s.protocol.replace("sentences", "objects") + note) for s in kept
            ]
            return [dataclasses.replace(s, metric=m, protocol=p) for s, (m, p) in zip(kept, words, strict=True)]
        note = "" if self.unit == "sentence" else "; a sentence here is a reference with all its sentences merged"
        note += "; sentences of a sample are turns of one conversation" if self.together else ""
        note += f"; {self.note}" if self.note else ""
        return [dataclasses.replace(s, protocol=s.protocol + note) for s in scores]


def sentences(prediction: Prediction, sample: Sample) -> list[Sentence]:
    """Compare each phrase's segment with the union of its instances; pixels of ``sample.ignore`` are left out."""
    size = truth.size_of(sample)
    out = []
    for k, phrase in enumerate(sample.phrases):
        rows = [sample.instances[i].mask for i in phrase.instances]
        true = truth.union(sample.masks, rows, size)
        found = truth.decode(prediction.segments[k].mask) if k < len(prediction.segments) else np.zeros(size, bool)
        if found.shape != true.shape:
            raise ValueError(f"{sample.key}: mask {k} is {found.shape}, the annotation is {true.shape}")
        if sample.ignore is not None:
            keep = ~truth.decode(sample.ignore)
            true, found = true & keep, found & keep
        inter, union = int((true & found).sum()), int((true | found).sum())
        image = str(sample.image_id)
        out.append(Sentence(image, phrase.kind, inter, union, bool(phrase.instances), bool(found.any())))
    return out


def _scores(found: list[Sentence], names: tuple[str, ...], suffix: str) -> list[Score]:
    if not found:
        return []
    images = {image: k for k, image in enumerate(dict.fromkeys(s.image for s in found))}
    counts = np.zeros((len(images), 6 + len(LEVELS) + 2))
    for s in found:
        at_level = [s.target and s.iou >= level for level in LEVELS]
        row = [s.inter, s.union, s.iou, 1, s.target, not s.target, *at_level]
        counts[images[s.image]] += [*row, not s.target and not s.found, s.target and s.found]
    total = counts.sum(axis=0)
    wholes = {"cIoU": 1, "gIoU": 3, "P@0.5": 4, "P@0.7": 4, "P@0.9": 4, "N-acc": 5, "T-acc": 4}
    parts = {"cIoU": 0, "gIoU": 2, "P@0.5": 6, "P@0.7": 7, "P@0.9": 8, "N-acc": 9, "T-acc": 10}

    def fold(sums: np.ndarray) -> np.ndarray:
        columns = [ratio(sums[..., parts[m]], sums[..., wholes[m]]) for m in names]
        if "cIoU" in names:  # nothing anywhere, and nothing predicted: agreement
            k = names.index("cIoU")
            columns[k] = np.where(sums[..., 1] > 0, columns[k], 1.0)
        return 100 * np.stack(columns, axis=-1)

    out = []
    for metric, (value, ci) in zip(names, values_with_intervals(counts, fold), strict=True):
        count = len(found) if metric in ("cIoU", "gIoU") else int(total[wholes[metric]])
        if count:
            out.append(Score(metric + suffix, value, count, PROTOCOL[metric], ci))
    return out
