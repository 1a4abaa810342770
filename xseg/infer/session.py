"""A conversation about one image. The image goes through the model's encoders once, however many turns follow."""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from xseg.errors import UserError
from xseg.geometry import masks as rle
from xseg.infer import request
from xseg.infer.predictor import Predictor, choose, device, empty, opened
from xseg.models.generation import Generated
from xseg.paths import make_folder, writing_to
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN, SEG, SENTINELS
from xseg.types import Encoded, Formatted, ImageViews, Query, Segment, Turn

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Answer:
    """What the model said to one message."""

    question: str
    """As the person typed it."""
    text: str
    """Generated text up to the stop token, with ``<SEG>`` and the markers."""
    segments: tuple[Segment, ...] = ()
    """One per phrase, in order, objects of one name united; an empty mask = not in the image. None at all: no mask
    was asked for, or the answer does not hold exactly one ``<SEG>``."""

    @property
    def coverage(self) -> tuple[float, ...]:
        """Percent of the image that each segment covers."""
        return tuple(100 * rle.area(s.mask) / (s.mask["size"][0] * s.mask["size"][1]) for s in self.segments)

    def as_json(self) -> dict[str, Any]:
        """Everything, with masks as COCO RLE."""
        rows = [
            {"label": s.label, "score": round(s.score, 4), "coverage": round(c, 3), "mask": rle.to_json(s.mask)}
            for s, c in zip(self.segments, self.coverage, strict=True)
        ]
        return {"question": self.question, "text": self.text, "segments": rows}


class Session:
    """One image, a growing list of turns, greedy answers; ``answers`` is the history a person sees."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.image: Image | None = None
        self.name = ""
        """File name of the image, for saved files."""
        self.answers: list[Answer] = []
        self._turns: list[Turn] = []
        self._saved: dict[Path, str] = {}
        """Where this conversation lies: folder -> name of its file there."""
        self._views: ImageViews | None = None
        self._features: Any = None

    @torch.inference_mode()
    def set_image(self, image: Image | str | Path) -> None:
        """Encode an image and forget the conversation about the one before. UserError when it cannot be read."""
        picture = opened(image)
        self._views = self.predictor.processor.sizes.views(picture)
        self.image, self.name = picture, "image" if isinstance(image, Image) else Path(image).stem
        batch = self.predictor.processor.batch([Encoded("image", None, (self._views,), ())])
        model = self.predictor.model
        batch = batch.to(device(model))
        self._features = model.encode_images(batch.llm_pixels, batch.mask_pixels)
        self.answers, self._turns, self._saved = [], [], {}

    @torch.inference_mode()
    def ask(self, text: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """Answer a message; ``request.HELP`` says how it is understood. Masks come from the ``<SEG>`` it writes.

        A question that the model answers by a mask is asked once more, as one whose answer is a mask: only then is the
        question a phrase that the mask can be held against.
        Raises UserError without an image, and for text that cannot be a message; the history is then unchanged.
        """
        if self._views is None or self.image is None:
            raise UserError("no image yet: set one first (in the chat: /image FILE)")
        asked = request.read(_legible(text))
        turns, made, said = self._answered(asked, max_new_tokens)
        if not asked.phrases and said.count(SEG) == 1 and P_OPEN not in said:
            asked = request.riddle(asked.text)
            turns, made, said = self._answered(asked, max_new_tokens)
        segments: tuple[Segment, ...] = ()
        # phrases that the answer itself marks take the place of those asked for
        written = tuple(request.SPAN.findall(said))
        phrases, regions = (written, None) if written else (asked.phrases, asked.regions)
        if phrases and made.output is not None and len(made.queries[0]) == 1:
            row = made.queries[0][0]
            competing = () if written else phrases  # phrases of the model's own words are no names that compete
            output = self.predictor.recognised(made.batch, made.output, [()] * row + [competing])
            logits = output.mask_logits[-1, row], output.class_logits[-1, row]
            reject = self.predictor.processor.reject
            found = choose(*logits, self._views.geometry, phrases, reject=reject, regions=regions)
            segments = self._per_phrase(found, phrases)
        self._turns = [*turns, Turn("assistant", _harmless(said))]
        self.answers.append(Answer(text, said, segments))
        return self.answers[-1]

    def _answered(self, asked: request.Request, most: int) -> tuple[tuple[Turn, ...], Generated, str]:
        """The conversation with a new question, and its answer, as it was made and in words."""
        turns = (*self._turns, Turn("user", asked.text if self._turns else f"{IMAGE}\n{asked.text}"))
        processor, model = self.predictor.processor, self.predictor.model
        assert self._views is not None
        encoded = processor.encode(
            [self._views], Formatted(turns, self._queries(asked)), generation=True, key=asked.text
        )
        made = self.predictor.generate(processor.batch([encoded]).to(device(model)), most, self._features)
        return turns, made, processor.decode(made.sequences[0])

    def undo(self) -> bool:
        """Forget the last question and its answer; False when there is none."""
        if not self.answers:
            return False
        self.answers.pop()
        del self._turns[-2:]
        return True

    def save(self, folder: str | Path) -> Path:
        """Write the conversation with its masks into ``folder`` and return the file.

        That is ``conversation.json``, or ``conversation-02.json``, … where others lie; saved again, a conversation
        takes the place of its own file. UserError where nothing can be written.
        """
        folder = make_folder(Path(folder))
        numbers = (f"conversation-{n:02d}.json" for n in itertools.count(2))
        names = itertools.chain(["conversation.json"], numbers)
        own = self._saved.get(folder.resolve())
        path = folder / (own or next(name for name in names if not os.path.lexists(folder / name)))
        record: Mapping[str, Any] = {"image": self.name, "turns": [a.as_json() for a in self.answers]}
        partial = path.with_name(f"{path.name}.partial")
        with writing_to(folder):
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
            os.replace(partial, path)
        self._saved[folder.resolve()] = path.name
        return path

    def _queries(self, asked: request.Request) -> tuple[Query, ...]:
        if not asked.phrases:
            return ()
        earlier = "".join(turn.text for turn in self._turns)
        first = len(request.SPAN.findall(earlier))
        return (Query(earlier.count(SEG), tuple(range(first, first + len(asked.phrases)))),)

    def _per_phrase(self, found: tuple[Segment, ...], phrases: tuple[str, ...]) -> tuple[Segment, ...]:
        assert self._views is not None
        out = []
        for place, label in enumerate(phrases):
            own = [s for s in found if s.category == place]
            mask = rle.union([s.mask for s in own]) if own else empty(self._views.geometry.original)
            out.append(Segment(mask, place, max((s.score for s in own), default=0.0), label))
        return tuple(out)


def _legible(text: str) -> str:
    """Bytes of a terminal that are no UTF-8 arrive as halves of characters, which no tokenizer takes."""
    if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"the message is no UTF-8 text: {text[:80]!a}; set the terminal to UTF-8 and type it again")
    return text


def _harmless(said: str) -> str:
    """A generated answer as it may stand in the next question: sentinels out, and markers only where they pair up."""
    for token in SENTINELS:
        said = said.replace(token, "")
    paired = request.SPAN.sub("", said)
    if P_OPEN in paired or P_CLOSE in paired:
        said = said.replace(P_OPEN, "").replace(P_CLOSE, "")
    return said
