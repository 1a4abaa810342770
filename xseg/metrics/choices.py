"""Questions with a closed answer: a letter (MMBench, SEED-Bench, AI2D), or yes and no (MME, POPE). Generated text is
matched by the rules below; no judge model reads it."""

import re
from typing import Self

import numpy as np

from xseg.metrics.answers import TAG, normalise, target
from xseg.metrics.bootstrap import ratio, values_with_intervals
from xseg.types import Prediction, Sample, Score

LETTERS = "ABCDEFGH"
ALONE = re.compile(rf"\W*([{LETTERS}])\s*(?:[.):,;\]]|$)")
SAID = re.compile(rf"(?i:(?:the )?(?:correct )?(?:answer|option)(?: is)?)\W*([{LETTERS}])(?![\w'])")
RULE = 'answers whose first "yes" or "no" is the annotated one; exact matching, greedy generation'
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""MME's kinds of question (Fu et al. 2023), two questions about each picture, one of which is to be answered "yes"."""


def letter(text: str) -> str:
    """The option a text begins with: "B", "(B) a dog", "b", "The answer is B"; "" = none, as in "A dog"."""
    text = TAG.sub(" ", text).strip()
    match = ALONE.match(text) or SAID.match(text)
    if match:
        return match[1]
    bare = text.strip(" .()").upper()
    return bare if bare and bare in set(LETTERS) else ""


def yes_or_no(text: str) -> str:
    """ "yes" or "no", whichever word comes first; "" = neither."""
    return next((word for word in normalise(text).split() if word in ("yes", "no")), "")


class Letters:
    """Part of the questions with the right option, in percent; and of those with the right one in every order.

    Samples of one ``image_id`` are one question with its options in several orders (MMBench's circular evaluation).
    """

    def __init__(self) -> None:
        self.answers: list[tuple[str, bool]] = []
        """(question, right) per sample."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Compare the option an answer begins with: 100 or 0."""
        right = letter(prediction.text) == target(sample).strip().upper()
        self.answers.append((str(sample.image_id), right))
        return {"accuracy": 100.0 * right}

    def __iadd__(self, other: Self) -> Self:
        self.answers += other.answers
        return self

    def compute(self) -> list[Score]:
        """The share of rows; where questions come in several orders, also that of questions."""
        if not self.answers:
            return []
        counts = _by_group(self.answers)
        table = np.stack([counts[:, 0], counts[:, 1], counts[:, 0] == counts[:, 1], np.ones(len(counts))], axis=1)
        values = values_with_intervals(table, lambda s: 100 * ratio(s[..., [0, 2]], s[..., [1, 3]]))
        rule = "answers that begin with the right option's letter; exact matching, greedy generation"
        (value, ci), (whole, whole_ci) = values
        out = [Score("accuracy", value, len(self.answers), rule, ci)]
        if len(counts) < len(self.answers):
            text = f"questions answered rightly in every order of their options; {rule}"
            out.append(Score("circular accuracy", whole, len(counts), text, whole_ci))
        return out


class YesNo:
    """Accuracy and F1 of "yes" in percent, accuracy per picture, and MME's two sums where all its kinds are there.

    Samples of one kind and one ``image_id`` are the questions about one picture.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[str, str, str, str]] = []
        """(kind, picture, annotated, said) per sample."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Compare one answer: 100 or 0."""
        said, wanted = yes_or_no(prediction.text), yes_or_no(target(sample))
        self.answers.append((sample.kind, str(sample.image_id), wanted, said))
        return {"accuracy": 100.0 * (said == wanted)}

    def __iadd__(self, other: Self) -> Self:
        self.answers += other.answers
        return self

    def compute(self) -> list[Score]:
        """All questions, then MME's sums, then the accuracy per kind of question."""
        if not self.answers:
            return []
        kinds = sorted({a[0] for a in self.answers})
        out = self._overall()
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            if set(members) <= set(kinds):
                out.append(self._sum(name, members))
        for kind in kinds if len(kinds) > 1 else ():
            rows = [(image, wanted == said) for k, image, wanted, said in self.answers if k == kind]
            [(value, ci)] = values_with_intervals(_by_group(rows), lambda s: 100 * ratio(s[..., :1], s[..., 1:]))
            out.append(Score(f"accuracy:{kind}", value, len(rows), RULE, ci))
        return out

    def _overall(self) -> list[Score]:
        images = {key: k for k, key in enumerate(dict.fromkeys(a[:2] for a in self.answers))}
        counts = np.zeros((len(images), 6))
        for kind, image, wanted, said in self.answers:
            both = wanted == said
            counts[images[kind, image], :5] += [both, 1, both and said == "yes", said == "yes", wanted == "yes"]
        counts[:, 5] = counts[:, 0] == counts[:, 1]
        pictures = np.concatenate([counts, np.ones((len(counts), 1))], axis=1)

        def fold(s: np.ndarray) -> np.ndarray:
            f1 = ratio(2 * s[..., 2], s[..., 3] + s[..., 4])
            return 100 * np.stack([ratio(s[..., 0], s[..., 1]), f1, ratio(s[..., 5], s[..., 6])], axis=-1)

        rows = [
            ("accuracy", RULE, len(self.answers)),
            ("F1", f'F1 of "yes"; {RULE}', len(self.answers)),
            ("accuracy+", f"pictures (per kind) all of whose questions are right; {RULE}", len(images)),
        ]
        values = zip(rows, values_with_intervals(pictures, fold), strict=True)
        found = [Score(name, value, n, text, ci) for (name, text, n), (value, ci) in values if not np.isnan(value)]
        return found if len(images) < len(self.answers) else [s for s in found if s.metric != "accuracy+"]

    def _sum(self, name: str, members: tuple[str, ...]) -> Score:
        place = {kind: k for k, kind in enumerate(members)}
        images = {key: k for k, key in enumerate(dict.fromkeys(a[:2] for a in self.answers if a[0] in place))}
        counts = np.zeros((len(images), len(members), 4))
        for kind, image, wanted, said in self.answers:
            if kind in place:
                counts[images[kind, image], place[kind], :2] += [wanted == said, 1]
        counts[..., 3] = counts[..., 1] > 0
        counts[..., 2] = (counts[..., 0] == counts[..., 1]) & (counts[..., 1] > 0)

        def fold(s: np.ndarray) -> np.ndarray:
            s = s.reshape(*s.shape[:-1], len(members), 4)
            both = ratio(s[..., 0], s[..., 1]) + ratio(s[..., 2], s[..., 3])
            return 100 * both.sum(axis=-1, keepdims=True)

        [(value, ci)] = values_with_intervals(counts.reshape(len(images), -1), fold)
        most = 200 * len(members)
        text = f"MME: sum over {len(members)} kinds of accuracy and accuracy per picture, of at most {most}; {RULE}"
        total = sum(a[0] in place for a in self.answers)
        return Score(f"{name} (of {most})", value, total, text, ci)


def _by_group(answers: list[tuple[str, bool]]) -> np.ndarray:
    """(groups, 2): right answers and all answers of each group."""
    groups = {key: k for k, key in enumerate(dict.fromkeys(key for key, _ in answers))}
    counts = np.zeros((len(groups), 2))
    for key, right in answers:
        counts[groups[key]] += [right, 1]
    return counts
