"""What a person types -> the turn the model was trained to read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from xseg.errors import UserError
from xseg.tasks import phrasing
from xseg.tasks.open_vocab_seg import KINDS, read_vocabulary
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN, REGION, SEG

SPAN = re.compile(re.escape(P_OPEN) + "(.*?)" + re.escape(P_CLOSE), re.DOTALL)
POLITE = re.compile(r"^(?:please|can you|could you|would you|i want you to)\b[\s,]*", re.IGNORECASE)
MASK_VERB = re.compile(
    r"^(?:segment|find|mark|outline|highlight|locate|select|mask|show(?: me)?)\b\s*(?P<colon>:)?\s*", re.IGNORECASE
)
PLACE = re.compile(r"\s+in (?:the|this) (?:image|picture|photo)$", re.IGNORECASE)
VOCABULARY = re.compile(rf"(?:{'|'.join(KINDS)})\s*:", re.IGNORECASE)
TALK = re.compile(
    r"^(?:what|which|who|whose|why|when|where|how|is|are|was|were|do|does|did|has|have|am|will|should|can|could|would"
    r"|describe|tell|explain|list|count|name|say|write|answer|compare|summarise|summarize|hello|hi|thanks|thank you"
    r"|yes|no)\b",
    re.IGNORECASE,
)
HELP = """\
the large red circle             a mask of that thing; "segment ...", "find ...", "show me ..." mean the same
segment: circle, square, grass   one mask per name (the colon makes it a list)
ins: circle; sem: grass, sky     the same list; outside the chat "ins" gives every object, "sem" one mask per name
how many circles are there?      an answer in words (ends with "?" or begins like a question or "describe ..."),
                                 and a mask where the model answers by one ("what could roll?")
where is <p>the circle</p>?      your own wording, sent as it is; each <p>...</p> gets a mask"""


@dataclass(frozen=True)
class Request:
    """One turn of a user in the model's own wording."""

    text: str
    """Without ``<image>``; phrases stand between ``<p>`` and ``</p>``."""
    phrases: tuple[str, ...] = ()
    """What masks are asked for, in order; empty = conversation."""
    regions: tuple[int, ...] | None = None
    """A vocabulary: places of the names that are one region each; the others are one segment per object. None = the
    message is no vocabulary."""


def read(text: str) -> Request:
    """Understand free text by the rules of ``HELP``. Raises UserError for empty text and misplaced special tokens."""
    text = " ".join(text.split())
    if not text:
        raise UserError("the message is empty: name a thing in the image or ask a question")
    _plain(text, (IMAGE, REGION, SEG))
    if P_OPEN in text or P_CLOSE in text:
        return Request(text, tuple(SPAN.findall(text)))
    if VOCABULARY.match(text):
        return vocabulary(text)
    wish = POLITE.sub("", text)
    verb = MASK_VERB.match(wish)
    if verb and verb["colon"]:
        return categories([name.strip(" .!") for name in wish[verb.end() :].split(",")])
    if verb and wish[verb.end() :].strip(" .?!"):
        return phrase(wish[verb.end() :])
    if text.endswith("?") or TALK.match(text):
        return Request(text)
    return phrase(wish)


def _plain(text: str, without: Sequence[str] = (IMAGE, REGION, SEG, P_OPEN, P_CLOSE)) -> None:
    """A token of the model's own in a person's words would stand for a picture, prompt or mask that is not there."""
    if not isinstance(text, str):
        raise UserError(f"{text!r} is no text: name a thing in the image, for example 'the large red circle'")
    for token in without:
        if token in text:
            raise UserError(f"the message holds {token}, which only xseg itself may write; remove it: {text[:80]!r}")


def phrase(text: str) -> Request:
    """Ask for one thing in the wording of evaluation. Raises UserError for empty text and the model's own tokens."""
    _plain(text)
    cleaned = PLACE.sub("", text.strip(" .?!")).lower()
    if not cleaned:
        raise UserError("the phrase is empty: name a thing in the image, for example 'the large red circle'")
    return Request(phrasing.PHRASE[0].format(phrase=phrasing.span(cleaned)), (cleaned,))


def riddle(question: str) -> Request:
    """Ask a question whose answer is a mask, in the wording of evaluation that wants a reason too."""
    return Request(phrasing.EXPLAIN[0].format(phrase=phrasing.span(question)), (question,))


def categories(names: Sequence[str]) -> Request:
    """Ask for everything that bears one of these names, in the wording of evaluation; errors as in ``phrase``."""
    for name in names:
        _plain(name)
    cleaned = list(dict.fromkeys(" ".join(name.lower().split()) for name in names if name.strip()))
    if not cleaned:
        raise UserError("the list of names is empty: write for example 'segment: circle, square, grass'")
    spans = ", ".join(phrasing.span(name) for name in cleaned)
    return Request(phrasing.CATEGORIES[0].format(names=spans), tuple(cleaned))


def vocabulary(text: str) -> Request:
    """Ask for the names of ``ins: person, bird; sem: water, sky``; UserError names what is wrong with the list."""
    names = read_vocabulary(text)
    asked = categories([name.text for name in names])
    return Request(asked.text, asked.phrases, tuple(k for k, name in enumerate(names) if not name.is_thing))
