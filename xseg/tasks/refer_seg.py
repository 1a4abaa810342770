"""Referring segmentation: one turn, one query and one mask per expression (X-SAM section 3.1), which may name one
object, several, or none (GRES)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from xseg import postprocess
from xseg.errors import UserError
from xseg.metrics import Metric, oracle
from xseg.metrics.iou import PhraseIoU
from xseg.metrics.oracle import OracleGap
from xseg.metrics.presence import Presence
from xseg.tasks import base, phrasing
from xseg.tasks.spoken import Spoken
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

LEAST = 0.5
"""Probability of a phrase below which its mask is empty, where neither a recipe nor a model says otherwise."""


@dataclass(frozen=True)
class Task(Spoken):
    """Options of referring segmentation."""

    negatives: Literal["own", "batch"] = "batch"
    """Training: "batch" lets the other phrases of the micro-batch compete, the paper's hidden rule; evaluation always
    scores a phrase against the background alone."""
    max_phrases: int = 8
    """Training: of a sample with more phrases, this many are drawn (X-SAM main cuts samples at 8)."""
    sentences: Literal["each", "merged"] = "each"
    """"each": every sentence is a phrase of its own (X-SAM, LISA); "merged": all sentences about one reference are one
    phrase (PSALM). The numbers of the two must not be compared."""
    reject: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Empty mask where the phrase is less probable than this against the background: None = the value that the model
    was calibrated to (``xseg calibrate``), else 0.5, where the best decoder query takes background for likelier; 0 =
    always a mask, as on sets whose every phrase has a target."""
    join: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sets whose phrases name several objects: the masks of all decoder queries at least this sure of the phrase are
    united (X-SAM main takes 0.6 for gRefCOCO); None = only the best one's mask."""
    mask_threshold: float = 0.5

    name: ClassVar[str] = "refer_seg"

    def view(self, sample: Sample) -> Sample:
        """Merge the sentences of each reference where ``sentences`` says so."""
        return merged(sample) if self.sentences == "merged" else sample

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask for each phrase in its own turn; all instances of a phrase are targets, and there may be none.

        Raises UserError for a sample without a phrase, and for one of several whose answers are to be generated.
        """
        if not sample.phrases:
            raise UserError(f"{sample.key}: task refer_seg needs phrases, this sample has none; check its source")
        waits = self.waits(sample, train)
        turns: list[Turn] = []
        queries = []
        for k, phrase in enumerate(drawn(sample.phrases, self.max_phrases, rng) if train else sample.phrases):
            head = "" if turns else f"{IMAGE}\n"
            question = phrasing.pick(phrasing.PHRASE, rng, train).format(phrase=phrasing.span(phrase.text.lower()))
            turns += [Turn("user", head + question), Turn("assistant", self.said(phrase, rng, train))]
            queries.append(query(k, sample, phrase, self.negatives if train else "own"))
        return Formatted(tuple(turns[:-1] if waits else turns), tuple(queries))

    def decode(
        self, output: ModelOutput | None, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """One segment per phrase, from the decoder query with the highest probability of the phrase; none for a phrase
        that was not answered.

        Raises UserError when phrases fell to the length limit of the text: a score must not leave them out.
        """
        if output is None or self.unanswered(queries, text):
            return Prediction(sample.key, text=text)
        options = {"reject": self._least, "join": self.join, "threshold": self.mask_threshold}
        return dataclasses.replace(masks_of_phrases(output, queries, sample, g, options), text=text)

    def metrics(self) -> list[Metric]:
        """CIoU, gIoU and the rest per sentence (or reference), presence, and the oracle gap."""
        note = f"empty below probability {self._least:.4g}" if self._least else ""
        unit: Literal["sentence", "reference"] = "sentence" if self.sentences == "each" else "reference"
        return [PhraseIoU(unit, note), Presence(), OracleGap(), *self.heard()]

    @property
    def _least(self) -> float:
        return LEAST if self.reject is None else self.reject

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


def drawn(phrases: Sequence[Phrase], most: int, rng: np.random.Generator) -> list[Phrase]:
    """At most ``most`` phrases in a new order each time, so that no phrase always has the same turns before it."""
    return [phrases[i] for i in rng.permutation(len(phrases))[:most]]


def query(place: int, sample: Sample, phrase: Phrase, negatives: Literal["own", "batch"]) -> Query:
    """The query of the ``place``-th turn. A crowd that is named is the target, as it is for the metric; left out, it
    would teach "not there"."""
    rows = tuple(sample.instances[i].mask for i in phrase.instances)
    return Query(place, (place,), rows, (0,) * len(rows), negatives=negatives)


def masks_of_phrases(
    output: ModelOutput, queries: Sequence[int], sample: Sample, g: ViewGeometry, options: dict[str, Any]
) -> Prediction:
    """One segment per phrase of a sample by ``postprocess.best`` with ``options``, and the oracle gap."""
    base.check_all_fit(sample, queries, "phrases", "let the source give fewer phrases per sample")
    segments: list[Segment] = []
    pairs: list[oracle.Pair] = []
    for row, phrase in zip(queries, sample.phrases, strict=True):
        logits = output.class_logits[-1, row]
        # the query's own phrase stands first, the background last
        own = logits[:, [0, logits.shape[1] - 1]]
        best = postprocess.best(output.mask_logits[-1, row], own, g, concept=0, **options)
        segments.append(Segment(best.mask, 0, best.score, phrase.text))
        if phrase.instances:
            named = [base.target(sample, phrase.instances, phrase.kind, phrase.text)]
            pairs += base.gap(sample, named, [best.mask], output.mask_logits[-1, row], g)
    return Prediction(sample.key, tuple(segments), extra={"oracle": tuple(pairs)})


def merged(sample: Sample) -> Sample:
    """Join the sentences of each reference, those with equal objects and the same id before the last ":", into one
    phrase. Raises UserError for a phrase whose id has no ":"."""
    groups: dict[tuple[str, tuple[int, ...]], list[Phrase]] = {}
    for phrase in sample.phrases:
        reference, colon, _ = phrase.id.rpartition(":")
        if not colon:
            raise UserError(
                f"phrase {phrase.text!r} has id {phrase.id!r}: sentences: merged needs 'reference:sentence'"
            )
        groups.setdefault((reference, phrase.instances), []).append(phrase)
    phrases = (
        dataclasses.replace(group[0], text=". ".join(p.text for p in group), id=reference)
        for (reference, _), group in groups.items()
    )
    return dataclasses.replace(sample, phrases=tuple(phrases))
