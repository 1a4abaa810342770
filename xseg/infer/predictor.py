"""The five-line script: load a model, name a thing, get its mask. Stateless; ``session`` holds conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image

from xseg import postprocess
from xseg.errors import UserError
from xseg.geometry import masks as rle
from xseg.geometry.views import read_image
from xseg.infer import naming, request
from xseg.infer.processing import XSegProcessor
from xseg.models import adapters, checkpoint, names
from xseg.models.generation import Generated
from xseg.models.names import Names
from xseg.paths import default_model, shipped
from xseg.tasks import interactive_seg, phrasing, spoken
from xseg.tokens import IMAGE, REGION
from xseg.types import Batch, Formatted, ImageViews, ModelOutput, Query, Segment, Size, Turn, ViewGeometry, VisualPrompt

PROMPTED = "interactive_seg"
"""The task of one drawn prompt."""
LEAST_SCORE = 0.5
"""Least score of an object when several names compete; for the eye, not for benchmarks."""


@dataclass(frozen=True)
class Result:
    """The segments found in one image; ``mask``, ``rle`` and ``score`` speak of all of them together."""

    size: Size
    """(H, W) of the image."""
    segments: tuple[Segment, ...]
    """One phrase: its one segment, empty when the thing is not there. Several names: one segment per object found."""

    @property
    def masks(self) -> np.ndarray:
        """(n, H, W) bool, one per segment."""
        return np.array([rle.decode(s.mask) for s in self.segments], bool).reshape(-1, *self.size)

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: every pixel of any segment."""
        return rle.decode(self.rle).astype(bool)

    @property
    def rle(self) -> Mapping[str, Any]:
        """COCO RLE of ``mask``."""
        return rle.union([s.mask for s in self.segments]) if self.segments else empty(self.size)

    @property
    def score(self) -> float:
        """The best segment's score in 0..1; 0 when nothing was found."""
        return max((s.score for s in self.segments), default=0.0)

    @property
    def found(self) -> bool:
        """Whether any pixel was found."""
        return any(rle.area(s.mask) for s in self.segments)


class Predictor:
    """A model with its processor. ``segment`` takes an image and what to look for; nothing is kept between calls."""

    def __init__(self, model: Any, processor: XSegProcessor) -> None:
        self.model, self.processor = model, processor

    @cached_property
    def names(self) -> Names | None:
        """The SigLIP that names objects too, where the model has one (``xseg names``)."""
        folder = self.processor.names
        if folder is None:
            return None
        made = names.load(folder, self.processor.sizes.llm)
        return made.to(device(self.model), next(self.model.parameters()).dtype)

    def recognised(self, batch: Batch, output: ModelOutput, asked: Sequence[Sequence[str]]) -> ModelOutput:
        """``naming.recognised``, where the model has such a SigLIP; ``asked`` (Q): the names of every query, or ()."""
        made = self.names
        return output if made is None else naming.recognised(made, self.processor.categories, batch, output, asked)

    @torch.inference_mode()
    def segment(self, image: Image | str | Path, text: str | Sequence[str], *, reject: float | None = None) -> Result:
        """Find what ``text`` names: a phrase (one mask), or a list of names that compete for objects.

        The list may be written ``ins: person, bird; sem: water, sky``: one segment per object, or one per name.
        The answer with its ``<SEG>`` is given, so that a mask never hangs on the wording of a generated one; but a
        model that learnt to explain before its mask answers a phrase itself, as in evaluation, and only where its words
        do not hold one ``<SEG>``, or mark a phrase of their own, they are given. Where a phrase is less likely than
        ``reject`` against the background, its mask is empty ("not there"); None = the model's calibrated value, 0
        always gives it a mask.
        Raises UserError for an unreadable image, empty text, or a model without a language part (stage 1).
        """
        if isinstance(text, str):
            asked = request.vocabulary(text) if request.VOCABULARY.match(text) else request.phrase(text)
        else:
            asked = request.categories(text)
        views = self.processor.sizes.views(opened(image))
        task = "refer_seg" if isinstance(text, str) and asked.regions is None else ""
        competing = () if task else asked.phrases
        output = self._output(task, views, asked.text, Query(0, tuple(range(len(asked.phrases)))), names=competing)
        logits = output.mask_logits[-1, 0], output.class_logits[-1, 0]
        reject = self.processor.reject if reject is None else reject
        found = choose(*logits, views.geometry, asked.phrases, reject=reject, regions=asked.regions)
        return Result(views.geometry.original, found)

    def generate(self, batch: Batch, most: int, features: Any = None) -> Generated:
        """Answer the prompts of a batch in at most ``most`` new tokens; ``features`` are those of its images, if known.

        Raises UserError for a batch without text.
        """
        stop_ids = self.processor.encoder.stop_ids if self.processor.encoder else ()
        return self.model.generate(batch, max_new_tokens=most, stop_ids=stop_ids, features=features)  # type: ignore[no-any-return]

    def _output(
        self,
        task: str,
        views: ImageViews,
        text: str,
        query: Query,
        prompts: tuple[VisualPrompt, ...] = (),
        names: Sequence[str] = (),
    ) -> ModelOutput:
        """The masks of one query, whose concepts are ``names`` where those compete. A model that speaks first in
        ``task`` answers itself, as far as its words have one ``<SEG>`` and no spans of their own; else the answer is
        given."""
        ask = Turn("user", f"{IMAGE}\n{text}")
        if task in self.processor.speaks_first:
            batch = self._batch(views, Formatted((ask,), (query,), prompts))
            made = self.generate(batch, spoken.Spoken.max_new_tokens)
            said = self.processor.decode(made.sequences[0])
            if made.output is not None and spoken.answers(made.queries[0], said):
                return made.output
        given = Formatted((ask, Turn("assistant", phrasing.ANSWER[0])), (query,), prompts)
        batch = self._batch(views, given)
        return self.recognised(batch, self.model(batch), (names,))

    def _batch(self, views: ImageViews, formatted: Formatted) -> Batch:
        waits = formatted.turns[-1].role == "user"
        encoded = self.processor.encode([views], formatted, generation=waits)
        return self.processor.batch([encoded]).to(device(self.model))

    @torch.inference_mode()
    def select(self, image: Image | str | Path, kind: str, where: Any) -> Result:
        """Find the one object that a drawn prompt points at.

        ``kind`` and ``where``, all in pixels of the image: "point" [(x, y), …], "scribble" or "stroke" the (x, y) of a
        line, "polygon" its corners, "box" (x1, y1, x2, y2), "mask" an (H, W) array. Raises UserError for another kind,
        for a prompt that has no pixel of the image, and for a model that never learnt to read prompts.
        """
        learnt = self.processor.learnt
        if learnt is not None and PROMPTED not in learnt:
            raise UserError(
                f"select: this model has learnt {', '.join(learnt)}, not {PROMPTED}: the mask of a prompt "
                "would be that of anything; train with a mixture that has prompts (`xseg demo`)"
            )
        views = self.processor.sizes.views(opened(image))
        size = views.geometry.original
        prompt = rle.encode(interactive_seg.from_user(kind, where, size))
        question = phrasing.PROMPT[0].format(phrase=phrasing.span(REGION))
        output = self._output(PROMPTED, views, question, Query(0, (0,)), (VisualPrompt(prompt),))
        logits = output.mask_logits[-1, 0], output.class_logits[-1, 0]
        best = postprocess.prompted(*logits, views.geometry, prompt)
        return Result(size, (Segment(best.mask, 0, best.score, kind),))


def load(
    folder: str | Path | None = None, device: str | None = None, *, merged: bool = True
) -> tuple[Predictor, XSegProcessor]:
    """Open the ``final`` folder of a stage: ``model, processor = load(folder)``, then ``model.segment(image, text)``.

    Without a folder the shipped ShapeWorld model is opened. ``device`` is "cuda" where there is one, else "cpu";
    there, weights stored in half precision become float32, which is what a CPU is fast and exact in. ``model.model``
    is the bare XSegModel; ``merged=False`` leaves LoRA beside the weights that it was trained with. Raises UserError
    when the folder holds no xseg model, or a damaged or incomplete one.
    """
    folder = default_model() if folder is None else Path(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = checkpoint.read_config(folder)
    processor = XSegProcessor.from_pretrained(folder)
    if processor.encoder is not None:
        checkpoint.check_vocabulary(folder, config, len(processor.encoder.tokenizer))
    model = adapters.load(folder, torch.float32 if device == "cpu" else None, merged=merged).eval()
    model.to(device)
    return Predictor(model, processor), processor


def choose(
    mask_logits: torch.Tensor,
    class_logits: torch.Tensor,
    g: ViewGeometry,
    phrases: Sequence[str],
    *,
    reject: float,
    regions: Sequence[int] | None = None,
) -> tuple[Segment, ...]:
    """Segments of one query: (N, h, w) masks, (N, K + 1) classes of K ``phrases``; ``regions`` as in ``Request``.

    One phrase gets the mask of its best object query (empty: not there). Several phrases compete for each object
    query, and every object of at least ``LEAST_SCORE`` is one segment, best first; a phrase may have none.
    """
    if len(phrases) == 1 and regions is None:
        best = postprocess.best(mask_logits, class_logits, g, concept=0, reject=reject)
        return (Segment(best.mask, 0, best.score, phrases[0]),)
    found = postprocess.instances(mask_logits, class_logits, g, score_threshold=LEAST_SCORE)
    return _united([Segment(s.mask, s.category, s.score, phrases[s.category]) for s in found], regions or ())


def _united(found: Sequence[Segment], regions: Sequence[int]) -> tuple[Segment, ...]:
    """Join the segments of each category in ``regions`` into one, with the score and the place of the best one."""
    out: dict[tuple[int, int], Segment] = {}
    for place, segment in enumerate(found):
        key = (segment.category, -1 if segment.category in regions else place)
        first = out.get(key)
        mask = segment.mask if first is None else rle.union([first.mask, segment.mask])
        out[key] = Segment(mask, segment.category, (first or segment).score, segment.label)
    return tuple(out.values())


def empty(size: Size) -> dict[str, Any]:
    """The RLE of a mask without a pixel."""
    return rle.encode(np.zeros(size, np.uint8))


def device(model: Any) -> torch.device:
    """Where the model's weights lie."""
    return next(model.parameters()).device  # type: ignore[no-any-return]


def opened(image: Image | str | Path) -> Image:
    """A picture as RGB, turned the way its camera says; ``examples/...`` may be the shipped one.

    Raises UserError when its file is missing or cannot be decoded, and for anything but a picture of Pillow or a path.
    """
    if isinstance(image, Image):
        return read_image(ImageOps.exif_transpose(image), "image")
    if not isinstance(image, str | Path):
        raise UserError(f"image of type {type(image).__name__}: give a path, or a picture by PIL.Image.fromarray(…)")
    path = Path(image) if Path(image).is_file() else shipped(str(image))
    if path is None:
        raise UserError(f"{image}: no such image file; give the path of a picture")
    return ImageOps.exif_transpose(read_image(path, "image"))
