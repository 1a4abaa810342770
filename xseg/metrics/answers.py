"""Generated answers: whether they equal the annotated one, and whether they ask for a mask."""

import re
import string
from typing import Self

import numpy as np

from xseg.errors import UserError
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
    """The answer to be generated: the last turn. UserError where that is the user's: nobody knows what is right."""
    if not sample.turns or sample.turns[-1].role != "assistant":
        raise UserError(
            f"{sample.key}: its last turn has no answer, so there is nothing to score; add the answer, or drop the "
            "question"
        )
    return sample.turns[-1].text


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
        protocol = "answers equal without regard to case, punctuation and spaces; greedy generation"
        out = _share([(image, right) for image, _, right in self.answers], "exact match", protocol)
        for kind in kinds if len(kinds) > 1 else []:
            of_kind = [(image, right) for image, other, right in self.answers if other == kind]
            out += _share(of_kind, f"exact match:{kind}", protocol)
        return out


class Answered:
    """Part of the generated answers that ask for one mask, in percent: others would else pass for "not there"."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, bool]] = []
        """(image, asked for a mask) per sample."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Count one answer; it asked for no mask where the prediction has no segment, not even an empty one."""
        self.answers.append((str(sample.image_id), bool(prediction.segments)))
        return {}

    def __iadd__(self, other: Self) -> Self:
        self.answers += other.answers
        return self

    def compute(self) -> list[Score]:
        """The share over all samples."""
        return _share(self.answers, "answered", "part of the generated answers with exactly one <SEG>, and no <p>")


def _share(answers: list[tuple[str, bool]], metric: str, protocol: str) -> list[Score]:
    """The part of the (image, right) that are right; nothing without one."""
    if not answers:
        return []
    images = {image: k for k, image in enumerate(dict.fromkeys(image for image, _ in answers))}
    counts = np.zeros((len(images), 2))
    for image, right in answers:
        counts[images[image]] += [right, 1]
    [(value, ci)] = values_with_intervals(counts, lambda sums: 100 * ratio(sums[..., :1], sums[..., 1:]))
    return [Score(metric, value, len(answers), protocol, ci)]
