"""The part of lint that reads what a sample says: words that are missing, and what its task would refuse in training.

No tokenizer is at hand here, so the markers of a conversation are counted in its text, where training counts ids.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from xseg.data.jsonl_line import MARKERS
from xseg.data.lint_records import Fault
from xseg.encode import CLOSE, OPEN
from xseg.errors import UserError
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN, REGION, SEG, SpecialIds, find_spans
from xseg.types import Categories, Formatted, Sample, Turn

MARKER = re.compile("|".join(map(re.escape, MARKERS)))
IDS = SpecialIds(*(MARKERS.index(marker) for marker in (SEG, P_OPEN, P_CLOSE)))


def names(categories: Categories | None, where: str) -> Iterator[Fault]:
    """Categories that cannot be asked for by their names."""
    for place, name in enumerate(categories.names if categories is not None else ()):
        found = MARKER.search(name)
        if not name.strip():
            yield Fault("text empty", f"{where}: category {place} has no name; write it")
        elif found:
            yield Fault(
                "marker", f"{where}: category {place}, {name!r}, holds {found[0]}: a sign to the model; rename it"
            )


def texts(sample: Sample) -> Iterator[Fault]:
    """Phrases without words or with markers, a grounded caption whose spans and masks do not pair up, empty or missing
    answers."""
    for number, phrase in enumerate(sample.phrases):
        place = f"{sample.key}: phrase {number} ({phrase.id})"
        found = MARKER.search(phrase.text)
        if not phrase.text.strip():
            yield Fault("text empty", f"{place} has no words; write it or drop it")
        elif found:
            yield Fault("marker", f"{place}, {phrase.text[:60]!r}, holds {found[0]}: a sign to the model; take it out")
    grounded = len(sample.turns) == 1 and sample.turns[0].role == "assistant"
    if grounded:
        caption = sample.turns[0].text
        opened, closed = caption.count(P_OPEN), caption.count(P_CLOSE)
        masked = sum(bool(p.instances) for p in sample.phrases)
        if opened != closed or opened > masked or len(sample.phrases) != masked:
            yield Fault(
                "spans and masks",
                f"{sample.key}: {opened} {P_OPEN} and {closed} {P_CLOSE} in the caption, {masked} of "
                f"{len(sample.phrases)} phrases with a mask; each span needs both marks and its masks",
            )
    for number, turn in enumerate(sample.turns):
        if not turn.text.strip():
            yield Fault("text empty", f"{sample.key}: turn {number} has no words; write it or drop the conversation")
    if sample.turns and sample.turns[-1].role == "user":
        yield Fault(
            "no answer",
            f"{sample.key}: its last turn is the user's: there is nothing to learn or to score; add the answer, or "
            "drop the question",
        )


def refused(sample: Sample, task: Any, index: int, *, train: bool) -> Iterator[Fault]:
    """What the task says against the sample when it makes the conversation of it, and markers that do not fit."""
    try:
        seen = task.view(sample)
        formatted = task.format(seen, np.random.default_rng(index), (), train=train)
        _check_markers(formatted, len(sample.images))
    except UserError as error:
        told = str(error).replace(f"{sample.key}: ", "")
        # a recipe with the wrong task says the same of every sample: once is enough
        yield Fault("refused", f"{sample.key}: {told}", f"refused: {told}")


def _check_markers(formatted: Formatted, pictures: int) -> None:
    """UserError where markers do not pair up, or are others than queries, prompts and pictures ask for."""
    for turn in formatted.turns:
        _check_turn(turn)
    text = "".join(turn.text for turn in formatted.turns)
    ids = np.array([MARKERS.index(marker) for marker in MARKER.findall(text)], np.int64)
    spans = len(find_spans(ids, IDS))
    asked = max((concept + 1 for query in formatted.queries for concept in query.concepts), default=0)
    answered = bool(formatted.turns) and formatted.turns[-1].role == "assistant"
    _same(text, P_OPEN, spans, asked, "spans that its masks belong to", exact=False)
    _same(text, REGION, text.count(REGION), len(formatted.prompts), "prompts")
    if answered:
        _same(text, SEG, text.count(SEG), sum(query.seg is not None for query in formatted.queries), "masks asked for")
    if text.count(IMAGE) > pictures:
        raise UserError(f"the text holds {text.count(IMAGE)} {IMAGE} for {pictures} pictures; it needs one each")


def _check_turn(turn: Turn) -> None:
    if OPEN in turn.text or CLOSE in turn.text:
        raise UserError(f"text holds the control character U+0002 or U+0003; remove it: {turn.text[:80]!r}")
    if turn.role == "user" and SEG in turn.text:
        raise UserError(f"a user's text holds {SEG}, which only answers may; remove it: {turn.text[:80]!r}")


def _same(text: str, marker: str, found: int, wanted: int, what: str, *, exact: bool = True) -> None:
    if found < wanted or (exact and found != wanted):
        raise UserError(f"the text holds {found} {marker} for {wanted} {what}, each needs its own: {text[:80]!r}")
