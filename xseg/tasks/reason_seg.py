"""Reasoning segmentation: a question or a phrase that takes a step of thought, an explanation where one is known, and a
mask (X-SAM section 3.1; LISA's ReasonSeg)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from xseg.errors import UserError
from xseg.geometry.masks import row_rle, union
from xseg.metrics import Metric
from xseg.metrics.iou import PhraseIoU
from xseg.metrics.oracle import OracleGap
from xseg.metrics.presence import Presence
from xseg.tasks import phrasing
from xseg.tasks.refer_seg import drawn, masks_of_phrases, query
from xseg.tasks.spoken import Spoken
from xseg.tokens import IMAGE
from xseg.types import Formatted, Instance, Masks, ModelOutput, Phrase, Prediction, Sample, Turn, ViewGeometry

SHORT = "short"
"""Kind of a phrase that is no sentence."""


@dataclass(frozen=True)
class Task(Spoken):
    """Options of reasoning segmentation."""

    asks: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Training: probability that a question with a known explanation asks for it and gets it (the paper's value).
    Evaluation asks for the mask alone, but for an explanation where answers are generated."""
    explain: Literal["behind", "before", "around"] = "before"
    max_phrases: int = 8
    """Training: of a sample with more questions, this many are drawn."""
    reject: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Least probability of a question against the background for a mask that is not empty; 0 = always a mask, as on
    ReasonSeg, where every question has a target."""
    mask_threshold: float = 0.5

    name: ClassVar[str] = "reason_seg"

    @property
    def note(self) -> str:
        """How the answer came about, unless it was given."""
        note = super().note
        return f"; asked for an explanation{note}" if note else ""

    @property
    def speaks_first(self) -> bool:
        """Whether every answer may hold an explanation before its mask; who gives some answers without can do both."""
        return self.explain != "behind" and self.asks == 1

    def view(self, sample: Sample) -> Sample:
        """Join the objects of each question: the answer is one mask (LISA's ReasonSeg), of one decoder query."""
        return united(sample)

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask each question in its own turn: the whole question is the concept, the instruction stands behind it.

        Phrases of kind "short" are asked for as a referring expression is.
        """
        if not sample.phrases:
            raise UserError(f"{sample.key}: task reason_seg needs questions, this sample has none; check its source")
        waits = self.waits(sample, train)
        turns: list[Turn] = []
        queries = []
        for k, phrase in enumerate(drawn(sample.phrases, self.max_phrases, rng) if train else sample.phrases):
            question, answer = self._words(phrase, rng, train)
            head = "" if turns else f"{IMAGE}\n"
            turns += [Turn("user", head + question), Turn("assistant", answer)]
            queries.append(query(k, sample, phrase, "own"))
        return Formatted(tuple(turns[:-1] if waits else turns), tuple(queries))

    def _words(self, phrase: Phrase, rng: np.random.Generator, train: bool) -> tuple[str, str]:
        explains = bool(phrase.explanation) and rng.random() < self.asks if train else self.eval_mode == "generate"
        wordings = phrasing.EXPLAIN if explains else phrasing.PHRASE if phrase.kind == SHORT else phrasing.QUESTION
        text = phrase.text.lower() if phrase.kind == SHORT else phrase.text
        answer = self.said(phrase, rng, train) if explains else phrasing.pick(phrasing.ANSWER, rng, train)
        return phrasing.pick(wordings, rng, train).format(phrase=phrasing.span(text)), answer

    def decode(
        self, output: ModelOutput | None, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """One segment per question, from the decoder query most sure of it, none for a question that was not answered;
        UserError when questions were cut off."""
        if output is None or self.unanswered(queries, text):
            return Prediction(sample.key, text=text)
        options = {"reject": self.reject, "threshold": self.mask_threshold}
        return dataclasses.replace(masks_of_phrases(output, queries, sample, g, options), text=text)

    def metrics(self) -> list[Metric]:
        """CIoU, gIoU and the rest without ignored pixels, over all, short and long questions; the oracle gap."""
        note = f"empty below probability {self.reject:.4g}" if self.reject else ""
        return [PhraseIoU(note=note), Presence(), OracleGap(), *self.heard()]

    @staticmethod
    def example() -> Sample:
        """A 8 x 12 picture of two discs; a question, a phrase, and pixels that count neither way."""
        from PIL import Image

        from xseg.geometry.masks import encode

        id_map = np.zeros((8, 12), np.int32)
        id_map[1:4, 1:4], id_map[3:7, 6:11] = 1, 2
        masks = Masks((8, 12), id_map=id_map, ids=(1, 2))
        phrases = (
            Phrase("What could roll farther?", (1,), "0", "long", "The larger disc keeps its momentum longer."),
            Phrase("The odd one out", (0,), "1", SHORT),
        )
        image = Image.fromarray((id_map[..., None] * [90, 50, 20]).astype(np.uint8))
        instances = (Instance(0, -1, id=1), Instance(1, -1, id=2))
        ignore = np.zeros((8, 12), bool)
        ignore[7] = True
        return Sample(
            "example/reason",
            (image,),
            (8, 12),
            masks,
            instances,
            phrases=phrases,
            image_id=1,
            ignore=encode(ignore),
        )


def united(sample: Sample) -> Sample:
    """Give each phrase of several objects one that is all of them; the objects themselves stay as they are."""
    if sample.masks is None or all(len(phrase.instances) < 2 for phrase in sample.phrases):
        return sample
    rles = [row_rle(sample.masks, row) for row in range(len(sample.masks))]
    instances, phrases = list(sample.instances), list(sample.phrases)
    for k, phrase in enumerate(sample.phrases):
        if len(phrase.instances) > 1:
            members = [instances[i] for i in phrase.instances]
            phrases[k] = dataclasses.replace(phrase, instances=(len(instances),))
            instances.append(dataclasses.replace(members[0], mask=len(rles)))
            rles.append(union([rles[member.mask] for member in members]))
    masks = Masks(sample.masks.size, tuple(rles))
    return dataclasses.replace(sample, masks=masks, instances=tuple(instances), phrases=tuple(phrases))
