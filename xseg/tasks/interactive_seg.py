"""Interactive segmentation: a drawn prompt -> the one object it points at (X-SAM sections 3.1 and 4.2; PSALM's
COCO-Interactive)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from xseg import postprocess
from xseg.errors import UserError, did_you_mean
from xseg.geometry import prompts, strokes
from xseg.geometry.masks import decode, encode, row_rle
from xseg.metrics import Metric, oracle
from xseg.metrics.iou import PhraseIoU
from xseg.metrics.oracle import OracleGap
from xseg.metrics.video import RegionAndOutline
from xseg.tasks import base, phrasing
from xseg.tasks.refer_seg import drawn, query
from xseg.tasks.spoken import Spoken
from xseg.tokens import IMAGE, REGION
from xseg.types import (
    Formatted,
    Instance,
    Masks,
    ModelOutput,
    Phrase,
    Prediction,
    Sample,
    Segment,
    Size,
    Turn,
    ViewGeometry,
    VisualPrompt,
)

Kind = Literal["point", "scribble", "stroke", "polygon", "box", "mask"]
KINDS: tuple[Kind, ...] = ("point", "scribble", "stroke", "polygon", "box", "mask")


@dataclass(frozen=True)
class Task(Spoken):
    """Options of interactive segmentation."""

    kinds: tuple[Kind, ...] = KINDS
    """Kinds of prompt, drawn for each object anew. Evaluation draws by the sample's key, so that the prompts are fixed;
    a published row has one kind."""
    frames: bool = False
    """Samples are frames of clips, each with its own prompts: J and F of every object are scored too (DAVIS)."""
    max_objects: int = 8
    """Training: of a sample with more objects, this many are drawn."""
    score_threshold: float = 0.5
    """Decoder queries at least this sure of the prompt are candidates; the one nearest to the prompt wins."""
    mask_threshold: float = 0.5
    nearest_by: Literal["box", "mask"] = "box"
    """What says how near a candidate is: the IoU of the boxes (the paper) or of the masks (X-SAM's branch main)."""

    name: ClassVar[str] = "interactive_seg"

    def view(self, sample: Sample) -> Sample:
        """Make every object that is no crowd a phrase; its kind is the prompt's in evaluation."""
        phrases = tuple(
            Phrase("", (k,), str(instance.id), _pick(self.kinds, fixed(sample, k)), instance.explanation)
            for k, instance in enumerate(sample.instances)
            if not instance.is_crowd
        )
        return dataclasses.replace(sample, phrases=phrases)

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask for each object in its own turn, by a prompt in the place of its name."""
        if not sample.phrases or not self.kinds:
            raise UserError(
                f"{sample.key}: task interactive_seg needs objects and kinds of prompt, this sample has "
                f"{len(sample.instances)} instances, crowds among them, and kinds are {list(self.kinds)}"
            )
        waits = self.waits(sample, train)
        turns: list[Turn] = []
        queries, shown = [], []
        for k, phrase in enumerate(drawn(sample.phrases, self.max_objects, rng) if train else sample.phrases):
            place = phrase.instances[0]
            kind = _pick(self.kinds, rng) if train else phrase.kind
            shown.append(VisualPrompt(prompt_of(sample, place, kind, rng if train else fixed(sample, place))))
            head = "" if turns else f"{IMAGE}\n"
            question = phrasing.pick(phrasing.PROMPT, rng, train).format(phrase=phrasing.span(REGION))
            turns += [Turn("user", head + question), Turn("assistant", self.said(phrase, rng, train))]
            queries.append(query(k, sample, phrase, "own"))
        return Formatted(tuple(turns[:-1] if waits else turns), tuple(queries), tuple(shown))

    def decode(
        self, output: ModelOutput | None, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """One segment per object, none for one that was not answered; UserError when objects were cut off."""
        if output is None or self.unanswered(queries, text):
            return Prediction(sample.key, text=text)
        base.check_all_fit(sample, queries, "prompts", "use a source that gives one object per sample")
        segments: list[Segment] = []
        pairs: list[oracle.Pair] = []
        for row, phrase in zip(queries, sample.phrases, strict=True):
            place = phrase.instances[0]
            logits = output.class_logits[-1, row]
            best = postprocess.prompted(
                output.mask_logits[-1, row],
                logits[:, [0, logits.shape[1] - 1]],
                g,
                prompt_of(sample, place, phrase.kind, fixed(sample, place)),
                score_threshold=self.score_threshold,
                mask_threshold=self.mask_threshold,
                nearest_by=self.nearest_by,
            )
            segments.append(Segment(best.mask, 0, best.score, phrase.kind))
            named = [base.target(sample, [place], phrase.kind)]
            pairs += base.gap(sample, named, [best.mask], output.mask_logits[-1, row], g)
        return Prediction(sample.key, tuple(segments), text=text, extra={"oracle": tuple(pairs)})

    def metrics(self) -> list[Metric]:
        """MIoU and cIoU over objects, per kind of prompt, the oracle gap, and J and F of frames."""
        note = f"prompts: {', '.join(self.kinds)}, as annotated or drawn by the sample's key"
        scores: list[Metric] = [PhraseIoU("object", note), OracleGap(), *self.heard()]
        return [*scores, RegionAndOutline()] if self.frames else scores

    @staticmethod
    def example() -> Sample:
        """A 16 x 24 picture with two blocks, one of which has an annotated point."""
        from PIL import Image

        id_map = np.zeros((16, 24), np.int32)
        id_map[2:8, 2:8], id_map[6:14, 12:22], id_map[0, 20:] = 1, 2, 3
        masks = Masks((16, 24), id_map=id_map, ids=(1, 2, 3))
        image = Image.fromarray((id_map[..., None] * [70, 50, 20]).astype(np.uint8))
        point = encode(prompts.from_points((16, 24), [(4, 4)]))
        instances = (Instance(0, -1, id=1, prompts={"point": point}), Instance(1, -1, id=2), Instance(2, -1, True, 3))
        return Sample("example/interactive", (image,), (16, 24), masks, instances, image_id=1)


def fixed(sample: Sample, instance: int) -> np.random.Generator:
    """The generator of an object's prompt in evaluation: by the sample's key, so that prompts never change."""
    return np.random.default_rng(list(f"{sample.key}/{instance}".encode()))


def prompt_of(sample: Sample, instance: int, kind: str, rng: np.random.Generator) -> Mapping[str, Any]:
    """The RLE of a prompt of one kind for an object: as annotated, else drawn from its mask.

    An object too small to draw in is its own prompt.
    """
    annotated = sample.instances[instance].prompts
    if kind in annotated:
        return annotated[kind]
    assert sample.masks is not None
    whole = row_rle(sample.masks, sample.instances[instance].mask)
    mask = decode(whole).astype(bool)
    if kind in ("stroke", "polygon") and mask.any():
        return encode((strokes.stroke if kind == "stroke" else strokes.polygon)(mask, rng))
    made = prompts.draw(mask, rng)
    return encode(prompts.widen(kind, made[kind])) if made else whole


def from_user(kind: str, where: Any, size: Size) -> np.ndarray:
    """Return the (H, W) bool mask of a prompt that a person drew; ``Predictor.select`` says what ``where`` is.

    Clicks and strokes are as wide as on photographs of 640 pixels, and thinner on smaller pictures in proportion.
    Raises UserError for an unknown kind, and when nothing of the prompt lies in the image.
    """
    if kind not in KINDS:
        raise UserError(f"prompt kind {kind!r}{did_you_mean(kind, KINDS)}")
    try:
        thin = {"point": prompts.from_points, "scribble": prompts.from_path, "stroke": prompts.from_path}
        if kind in thin:
            # on a small picture a photograph's click would cover whole things
            scale = min(1.0, max(size) / prompts.PHOTOGRAPH)
            mask = prompts.widen("point" if kind == "point" else "scribble", thin[kind](size, where), scale)
        elif kind == "box":
            mask = prompts.from_box(size, where)
        elif kind == "polygon":
            mask = strokes.filled(size, np.asarray(where, np.float64).reshape(-1, 2))
        else:
            mask = np.asarray(where).astype(bool).reshape(size)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {str(where)[:80]} on an image of {list(size)} (height, width): {error}") from error
    if not mask.any():
        raise UserError(f"{kind} {str(where)[:80]}: no pixel of it lies in the image of {list(size)} (height, width)")
    return mask


def _pick(kinds: Sequence[str], rng: np.random.Generator) -> str:
    return kinds[int(rng.integers(len(kinds)))] if kinds else ""
