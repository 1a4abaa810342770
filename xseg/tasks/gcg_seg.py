"""Grounded conversation generation: a caption whose spans the model marks itself, and their masks (X-SAM section 3.1;
GLaMM)."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from xseg import postprocess
from xseg.errors import UserError
from xseg.geometry.masks import decode, encode
from xseg.metrics import Metric
from xseg.metrics.gcg import GroundedCaption
from xseg.metrics.oracle import OracleGap
from xseg.tasks import base, phrasing
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN
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

SPAN = re.compile(f"{re.escape(P_OPEN)}(.*?){re.escape(P_CLOSE)}", re.DOTALL)


@dataclass(frozen=True)
class Task(base.Base):
    """Options of grounded conversation generation."""

    join: Annotated[float, Field(gt=0, le=1)] | None = None
    """Decoder queries at least this sure of a span give a mask of their own, beside the surest one's: several masks per
    span; None = one mask per span, and later ones take their pixels from earlier ones (the published protocol)."""
    mask_threshold: float = 0.5

    name: ClassVar[str] = "gcg_seg"
    scores_text: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 512

    @property
    def eval_mode(self) -> Literal["forced", "generate"]:
        """The caption is the answer."""
        return "generate"

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask for a caption; the answer is the annotated one with its spans, then a sentence with one ``<SEG>``.

        All masks of a span are targets of its class. Evaluation leaves the answer out, for generation: what competes is
        known only then. Raises UserError when the caption's spans are more than the sample's phrases, or when there is
        no caption.
        """
        caption = _caption(sample)
        ask = Turn("user", f"{IMAGE}\n{phrasing.pick(phrasing.CAPTION, rng, train)}")
        if not train:
            return Formatted((ask,))
        spans = SPAN.findall(caption)
        # a space behind each span, as the released models write it, and an end that parts it from what follows
        text = " ".join(SPAN.sub(lambda m: f"{P_OPEN}{m[1].strip()}{P_CLOSE} ", caption.lower()).split())
        text = text if text.endswith((".", "!", "?")) else f"{text}."
        answer = f"{text} {phrasing.pick(phrasing.GROUNDED, rng, train)}"
        if not spans:
            # nothing to segment: a caption alone, and no <SEG> that would ask for masks of nothing
            return Formatted((ask, Turn("assistant", text)))
        named = enumerate(sample.phrases[: len(spans)])
        targets = [(sample.instances[i].mask, k) for k, phrase in named for i in phrase.instances]
        rows, classes = tuple(row for row, _ in targets), tuple(k for _, k in targets)
        return Formatted((ask, Turn("assistant", answer)), (Query(0, tuple(range(len(spans))), rows, classes),))

    def decode(
        self, output: ModelOutput | None, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """One or more segments per generated span, in order; none where the answer has not exactly one ``<SEG>``."""
        # a marker that opens twice counts from the second on, as the model reads it
        spans = [found.rpartition(P_OPEN)[2].strip() for found in SPAN.findall(text)]
        if output is None or not queries or not spans:
            return Prediction(sample.key, text=text)
        masks, logits = output.mask_logits[-1, queries[0]], output.class_logits[-1, queries[0]]
        # answers of a batch have different numbers of spans: the columns are padded before the background
        logits = logits[:, [*range(len(spans)), logits.shape[1] - 1]]
        segments: list[Segment] = []
        for k, label in enumerate(spans):
            best = postprocess.best(masks, logits, g, concept=k, threshold=self.mask_threshold)
            found = [best] if self.join is None else self._several(masks, logits, g, best)
            segments += [Segment(s.mask, k, s.score, label) for s in found]
        segments = overwritten(segments) if self.join is None else segments
        return Prediction(sample.key, tuple(segments), text=text, extra={"oracle": _gap(sample, segments, masks, g)})

    def _several(self, masks: Any, logits: Any, g: ViewGeometry, best: Segment) -> list[Segment]:
        assert self.join is not None
        sure = postprocess.sure(masks, logits, g, concept=best.category, least=self.join, threshold=self.mask_threshold)
        return sure or [best]

    def metrics(self) -> list[Metric]:
        """METEOR, CIDEr, AP50, mIoU, recall, and the oracle gap."""
        return [GroundedCaption(), OracleGap()]

    @staticmethod
    def example() -> Sample:
        """A 8 x 12 picture of two circles and grass, with a caption of two spans, the first of which has two masks."""
        from PIL import Image

        id_map = np.zeros((8, 12), np.int32)
        id_map[6:] = 3
        id_map[1:4, 1:4], id_map[1:5, 6:11] = 1, 2
        masks = Masks((8, 12), id_map=id_map, ids=(1, 2, 3))
        phrases = (Phrase("two circles", (0, 1), "0"), Phrase("the grass", (2,), "1"))
        turns = (Turn("assistant", "There are <p>Two circles</p> over <p>the grass</p>."),)
        image = Image.fromarray((id_map[..., None] * [60, 50, 20]).astype(np.uint8))
        instances = tuple(Instance(k, -1, id=k + 1) for k in range(3))
        return Sample("example/gcg", (image,), (8, 12), masks, instances, None, phrases, turns, image_id=1)


def overwritten(segments: Sequence[Segment]) -> list[Segment]:
    """Each pixel goes to the last of the segments that has it, as in the one map of labels that X-SAM paints."""
    taken, out = None, []
    for segment in reversed(segments):
        mask = decode(segment.mask).astype(bool)
        free = mask if taken is None else mask & ~taken
        taken = mask if taken is None else mask | taken
        out.append(dataclasses.replace(segment, mask=encode(free)))
    return out[::-1]


def _caption(sample: Sample) -> str:
    caption = next((t.text for t in reversed(sample.turns) if t.role == "assistant"), None)
    if caption is None:
        raise UserError(
            f"{sample.key}: task gcg_seg needs a caption, this sample has no assistant turn; check its source"
        )
    if len(SPAN.findall(caption)) > len(sample.phrases):
        raise UserError(
            f"{sample.key}: the caption has {len(SPAN.findall(caption))} <p> spans for {len(sample.phrases)} phrases: "
            f"span k is phrase k; repair the annotation: {caption[:80]!r}"
        )
    return caption


def _gap(sample: Sample, segments: Sequence[Segment], masks: Any, g: ViewGeometry) -> tuple[Any, ...]:
    """Every annotated mask against the nearest of those given out, whatever its words."""
    named = [(i, phrase) for phrase in sample.phrases for i in phrase.instances]
    targets = [base.target(sample, [i], "", phrase.text) for i, phrase in named]
    chosen = [base.nearest_given(target, segments) for target in targets]
    return base.gap(sample, targets, chosen, masks, g)
