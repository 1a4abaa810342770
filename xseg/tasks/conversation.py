"""Conversation about images, as annotated; no masks (X-SAM section 3.1, LLaVA data)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from xseg.errors import UserError
from xseg.metrics import Metric
from xseg.metrics.answers import ExactMatch
from xseg.metrics.choices import Letters, YesNo
from xseg.tasks import base
from xseg.tokens import IMAGE, REGION, SPECIAL_TOKENS
from xseg.types import Formatted, ModelOutput, Prediction, Sample, Turn, ViewGeometry

LITERAL = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, REGION))))


@dataclass(frozen=True)
class Task(base.Base):
    """Options of conversation."""

    answers: Literal["text", "letter", "yes_no"] = "text"
    """What the generated answer is compared as: the whole text, the letter of an option, or yes and no."""

    name: ClassVar[str] = "conversation"
    scores_text: ClassVar[bool] = True

    @property
    def eval_mode(self) -> Literal["forced", "generate"]:
        """The words are the answer."""
        return "generate"

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Keep the turns verbatim, with the image forced to the begin of the first one.

        Evaluation leaves the last answer out, for generation. What only looks like a marker, such as the ``<p>`` of a
        web page, gets a space after its "<". Raises UserError when turns do not alternate from a user's on.
        """
        turns = [Turn(t.role, LITERAL.sub(lambda m: "< " + m[0][1:], t.text.replace(IMAGE, ""))) for t in sample.turns]
        roles = [t.role for t in turns]
        if not turns or roles != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
            raise UserError(f"{sample.key}: turns must alternate user, assistant, …; these are {roles}")
        head = f"{IMAGE}\n" * len(sample.images)
        turns[0] = Turn("user", head + (turns[0].text.strip() if head else turns[0].text))
        if roles[-1] == "user" and train:
            raise UserError(f"{sample.key}: the last turn has no answer, so there is nothing to learn; remove it")
        return Formatted(tuple(turns if train or roles[-1] == "user" else turns[:-1]))

    def decode(
        self, output: ModelOutput | None, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """Keep the generated text."""
        return Prediction(sample.key, text=text)

    def metrics(self) -> list[Metric]:
        """Exact match of texts per kind of question, of letters, or of yes and no."""
        kinds: dict[str, type[Metric]] = {"text": ExactMatch, "letter": Letters, "yes_no": YesNo}
        return [kinds[self.answers]()]

    @staticmethod
    def example() -> Sample:
        """Two questions about a small picture."""
        from PIL import Image

        turns = (
            Turn("user", "How many circles are there?\n<image>"),
            Turn("assistant", "Two."),
            Turn("user", "What colour is the left one?"),
            Turn("assistant", "Red"),
        )
        return Sample("example/conversation", (Image.new("RGB", (12, 8)),), turns=turns, image_id=1, kind="colour")
