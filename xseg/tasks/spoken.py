"""Answers that say something beside their masks: what tasks with one turn, one query and one mask per phrase share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from xseg.errors import UserError
from xseg.metrics import Metric
from xseg.metrics.answers import Answered
from xseg.tasks import base, phrasing
from xseg.tokens import P_OPEN
from xseg.types import Phrase, Sample

SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Spoken(base.Base):
    """Options of tasks whose answers may explain."""

    explain: Literal["behind", "before", "around"] = "behind"
    """Training: where an answer has the explanation of its phrase, if one is known: behind the mask, before it, or
    before it with its last sentence behind the mask once more, for ``<SEG>`` to foretell."""
    answer: Literal["given", "generated"] | None = None
    """Evaluation: whether the words of the answer are given, or the model finds them, for one phrase a sample, and the
    mask reads what was said. None = "generated" for a model that learnt to explain before the mask, else "given"."""

    max_new_tokens: ClassVar[int] = 512

    @property
    def eval_mode(self) -> Literal["forced", "generate"]:
        """As ``answer`` says."""
        return "generate" if self.answer == "generated" else "forced"

    @property
    def note(self) -> str:
        """How the answer came about, unless it was given."""
        if self.answer != "generated":
            return ""
        return "; the answer is generated: unless it has one <SEG>, its mask is empty and no oracle counts it"

    @property
    def speaks_first(self) -> bool:
        """Whether an explanation may stand before the mask."""
        return self.explain != "behind"

    def waits(self, sample: Sample, train: bool) -> bool:
        """Whether the last answer is left to the model. UserError for several, of which it could only give one."""
        waits = not train and self.eval_mode == "generate"
        if waits and len(sample.phrases) > 1:
            raise UserError(
                f"{sample.key}: {len(sample.phrases)} phrases or objects, and {self.name}.answer = 'generated' is for "
                "one: let the recipe's source make a sample of each (option grouping: 'sentence', or 'object' for a "
                "jsonl's objects), or set answer to 'given'"
            )
        return waits

    def unanswered(self, queries: Sequence[int], text: str) -> bool:
        """Whether an answer that was left to the model is none."""
        return self.eval_mode == "generate" and not answers(queries, text)

    def heard(self) -> list[Metric]:
        """The score of answers that were left to the model, beside those of their masks."""
        return [Answered()] if self.eval_mode == "generate" else []

    def said(self, phrase: Phrase, rng: np.random.Generator, train: bool) -> str:
        """The answer about a phrase; in training with its explanation."""
        answer, told = phrasing.pick(phrasing.ANSWER, rng, train), phrasing.spoken(phrase.explanation)
        if not train or not told:
            return answer
        if self.explain != "before":
            # no space: a Llama tokenizer puts one behind <SEG>, and <SEG> would foretell a second one, not the words
            answer = f"{answer.removesuffix('.')}{told if self.explain == 'behind' else SENTENCE.split(told)[-1]}"
        return answer if self.explain == "behind" else f"{told} {answer}"


def answers(queries: Sequence[int], text: str) -> bool:
    """Whether a generated answer has exactly one ``<SEG>``, whose query it gave, and marks no phrase of its own."""
    return len(queries) == 1 and P_OPEN not in text
