"""Exact match of a generated answer with the annotated one."""

import re
import string
from typing import Self

import numpy as np

from xseg.metrics.bootstrap import ratio, values_with_intervals
from xseg.types import Prediction, Sample, Score

TAG = re.compile(r"<\|[^|>]*\|>|</?s>|<SEG>|</?p>")
POINT = re.compile(r"(?<=\d)[.,](?=\d)|(?<!\w)-(?=\d)")
"""What is part of a number, and so of an answer: 1.5 is not 15, -3 is not 3."""
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Lower case, without special tokens, surplus spaces, and punctuation other than that of numbers."""
    text = TAG.sub(" ", text).lower()
    kept = {match.start() for match in POINT.finditer(text)}
    return " ".join(PUNCTUATION.sub(lambda m: m[0] if m.start() in kept else "", text).split())


def target(sample: Sample) -> str:
    """The answer to be generated: the last turn of the assistant."""
    return next((t.text for t in reversed(sample.turns) if t.role == "assistant"), "")


class ExactMatch:
    """Part of the answers that equal the annotation after ``normalise``, in percent, over all and per kind."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str, bool]] = []
        """(image, kind, right) per sample."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Compare one answer: 100 or 0."""
        right = normalise(prediction.text) == normalise(target(sample))
        self.answers.append((str(sample.image_id), sample.kind, right))
        return {"exact match": 100.0 * right}

    def __iadd__(self, other: Self) -> Self:
        self.answers += other.answers
        return self

    def compute(self) -> list[Score]:
        """The share over all samples, then per kind of question."""
        kinds = sorted({kind for _, kind, _ in self.answers} - {""})
        out = _score(self.answers, "")
        for kind in kinds if len(kinds) > 1 else []:
            out += _score([a for a in self.answers if a[1] == kind], f":{kind}")
        return out


def _score(answers: list[tuple[str, str, bool]], suffix: str) -> list[Score]:
    if not answers:
        return []
    images = {image: k for k, image in enumerate(dict.fromkeys(a[0] for a in answers))}
    counts = np.zeros((len(images), 2))
    for image, _, right in answers:
        counts[images[image]] += [right, 1]
    [(value, ci)] = values_with_intervals(counts, lambda sums: 100 * ratio(sums[..., :1], sums[..., 1:]))
    protocol = "answers equal without regard to case, punctuation and spaces; greedy generation"
    return [Score(f"exact match{suffix}", value, len(answers), protocol, ci)]
