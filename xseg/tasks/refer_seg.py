"""Referring segmentation: one turn, one query and one mask per expression (X-SAM section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from xseg import postprocess
from xseg.errors import UserError
from xseg.metrics.iou import PhraseIoU
from xseg.tasks import phrasing
from xseg.tokens import IMAGE
from xseg.types import (
    Formatted,
    Instance,
    Masks,
    ModelOutput,
    Phrase,
    Prediction,
    Query,
    Sample,
    Segment,
    Turn,
    ViewGeometry,
)


@dataclass(frozen=True)
class Task:
    """Options of referring segmentation."""

    negatives: Literal["own", "batch"] = "batch"
    """Training: "batch" lets the other phrases of the micro-batch compete, the paper's hidden rule; evaluation always
    scores a phrase against the background alone."""
    max_phrases: int = 8
    """Training: of a sample with more phrases, this many are drawn (X-SAM main cuts samples at 8)."""
    reject: bool = True
    """Empty mask where the best query takes background for likelier than the phrase. False: always a mask, as on
    sets whose every phrase has a target."""
    mask_threshold: float = 0.5

    name: ClassVar[str] = "refer_seg"
    eval_mode: ClassVar[Literal["forced", "generate"]] = "forced"

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask for each phrase in its own turn; all instances of a phrase are targets, and there may be none."""
        if not sample.phrases:
            raise UserError(f"{sample.key}: task refer_seg needs phrases, this sample has none; check its source")
        phrases = sample.phrases
        if train:
            # A new order each time, so that no phrase always has the same turns before it.
            phrases = tuple(phrases[i] for i in rng.permutation(len(phrases))[: self.max_phrases])
        turns: list[Turn] = []
        queries = []
        for k, phrase in enumerate(phrases):
            head = "" if turns else f"{IMAGE}\n"
            question = phrasing.pick(phrasing.PHRASE, rng, train).format(phrase=phrasing.span(phrase.text.lower()))
            turns += [Turn("user", head + question), Turn("assistant", phrasing.pick(phrasing.ANSWER, rng, train))]
            named = [sample.instances[i] for i in phrase.instances]
            # A crowd that is named is the target, as it is for the metric; left out, it would teach "not there".
            rows = tuple(i.mask for i in named)
            negatives = self.negatives if train else "own"
            queries.append(Query(k, (k,), rows, (0,) * len(rows), negatives=negatives))
        return Formatted(tuple(turns), tuple(queries))

    def decode(
        self, output: ModelOutput, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """One segment per phrase, from the decoder query with the highest probability of the phrase.

        Raises UserError when phrases fell to the length limit of the text: a score must not leave them out.
        """
        if len(queries) != len(sample.phrases):
            raise UserError(
                f"{sample.key}: {len(queries)} of {len(sample.phrases)} phrases fit the text; raise max_tokens of the "
                "model recipe, or let the source give fewer phrases per sample"
            )
        segments = []
        for query, phrase in zip(queries, sample.phrases, strict=True):
            logits = output.class_logits[-1, query]
            best = postprocess.best(
                output.mask_logits[-1, query],
                logits[:, [0, logits.shape[1] - 1]],  # the query's own phrase stands first, the background last
                g,
                concept=0,
                threshold=self.mask_threshold,
                reject=self.reject,
            )
            segments.append(Segment(best.mask, 0, best.score, phrase.text))
        return Prediction(sample.key, tuple(segments), text=text)

    def metrics(self) -> list[Any]:
        """CIoU, gIoU and the rest, per sentence."""
        return [PhraseIoU()]

    @staticmethod
    def example() -> Sample:
        """A 8 x 12 picture with two circles; three phrases: one, the other, and a thing that is not there."""
        from PIL import Image

        id_map = np.zeros((8, 12), np.int32)
        id_map[1:4, 1:4], id_map[3:7, 6:11] = 1, 2
        masks = Masks((8, 12), id_map=id_map, ids=(1, 2))
        phrases = (
            Phrase("The left circle", (0,), "0", "relation"),
            Phrase("the right Circle", (1,), "1", "relation"),
            Phrase("the green square", (), "2", "no-target"),
        )
        image = Image.fromarray((id_map[..., None] * [90, 50, 20]).astype(np.uint8))
        instances = (Instance(0, -1, id=1), Instance(1, -1, id=2))
        return Sample("example/refer", (image,), (8, 12), masks, instances, phrases=phrases, image_id=1)
