"""Conversation -> ids: chat template, chunk-wise tokenising, labels, spans (X-SAM: prompts of section 3.2).

The template is a Hugging Face chat template whose ``{% generation %}`` marks say what the assistant learns to write.
The rendered text is cut at those marks and at the sentinels, and every chunk is tokenised on its own: SentencePiece
puts its dummy prefix before every chunk, so encoding the whole string gives other ids than the released models saw.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xseg.errors import UserError
from xseg.tokens import IGNORE_LABEL, IMAGE, REGION, SEG, SENTINEL_PATTERN, SENTINELS, find_spans, special_ids
from xseg.types import EncodedText, Formatted, Turn

OPEN, CLOSE = "\x02", "\x03"  # control characters that no text holds; they mark supervised stretches while rendering
SUPERVISED, UNDERLINE, RESET = "\033[32m", "\033[4m", "\033[0m"


class Generation(Extension):
    """Jinja tag ``{% generation %}…{% endgeneration %}``: wraps what it encloses in marks that the encoder reads."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Turn the tag into a call of ``mark``."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        """Wrap the rendered body."""
        return f"{OPEN}{caller()}{CLOSE}"


class Encoder:
    """Turns conversations into ids with one tokenizer and one chat template.

    ``template`` is jinja source; ``max_tokens`` the longest result in ids (an image counts as one).
    Raises UserError when the tokenizer lacks a special token of xseg or the template cannot end an answer.
    """

    def __init__(self, tokenizer: Any, template: str, max_tokens: int) -> None:
        self.tokenizer, self.template, self.max_tokens = tokenizer, template, max_tokens
        self.special = special_ids(tokenizer)
        self._bos = _bos(tokenizer, template)
        self.stop_ids = self._stop_ids()

    def encode(self, turns: Sequence[Turn], *, generation: bool = False) -> EncodedText:
        """Encode a conversation; ``generation`` appends the header of the answer that is to be generated.

        A conversation longer than ``max_tokens`` loses whole (question, answer) pairs from its end; see
        ``surviving`` for the queries. A single pair is cut on the right, unless the cut would take a special token.
        Raises UserError when that does not help, when markers do not pair up, or when a user writes ``<SEG>``.
        """
        kept = list(turns)
        while True:
            ids, labels = self._tokenise(kept, generation)
            last_question = max((i for i, t in enumerate(kept) if t.role == "user"), default=0)
            if len(ids) <= self.max_tokens or generation or last_question == 0:
                break
            kept = kept[:last_question]
        return self._finish(ids, labels, turns, generation)

    def decode(self, ids: Sequence[int] | np.ndarray, *, stop: bool = False) -> str:
        """Return the text of ids with special tokens and sentinels written out; ``stop``: end before a stop id."""
        row = [int(i) for i in ids]
        if stop:
            row = row[: next((k for k, i in enumerate(row) if i in self.stop_ids), len(row))]
        return "".join(text for text, _ in self._pieces(row, [0] * len(row)))

    def show(self, encoded: EncodedText) -> str:
        """Return the conversation for a terminal: supervised text green, spans underlined."""
        style = np.where(encoded.labels != IGNORE_LABEL, 1, 0)
        for start, end in encoded.spans:
            style[start:end] += 2
        marks = ("", SUPERVISED, UNDERLINE, SUPERVISED + UNDERLINE)
        pieces = self._pieces(encoded.input_ids.tolist(), style.tolist())
        return "".join(f"{marks[s]}{text}{RESET}" if s else text for text, s in pieces)

    def _tokenise(self, turns: Sequence[Turn], generation: bool) -> tuple[np.ndarray, np.ndarray]:
        chunks = list(_chunks(self._text(turns, generation)))
        plain = [text for text, _ in chunks if text not in SENTINELS]
        encoded = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else [])
        ids, labels = list(self._bos), [IGNORE_LABEL] * len(self._bos)
        for text, supervised in chunks:
            row = [SENTINELS[text]] if text in SENTINELS else next(encoded)
            ids += row
            labels += row if supervised and text not in SENTINELS else [IGNORE_LABEL] * len(row)
        return np.array(ids, np.int64), np.array(labels, np.int64)

    def _text(self, turns: Sequence[Turn], generation: bool) -> str:
        for turn in turns:
            if OPEN in turn.text or CLOSE in turn.text:
                raise UserError(f"text holds the control character U+0002 or U+0003; remove it: {turn.text[:80]!r}")
            if turn.role == "user" and SEG in turn.text:
                raise UserError(f"a user's text holds {SEG}, which only answers may; remove it: {turn.text[:80]!r}")
        messages = [{"role": t.role, "content": t.text} for t in turns]
        names = {"bos_token": self.tokenizer.bos_token or "", "eos_token": self.tokenizer.eos_token or ""}
        try:
            return _compiled(self.template).render(messages=messages, add_generation_prompt=generation, **names)
        except jinja2.TemplateError as error:
            raise UserError(
                f"chat template: {type(error).__name__}: {error}; it gets `messages`, `add_generation_prompt`, "
                "`bos_token` and `eos_token`"
            ) from error

    def _finish(self, ids: np.ndarray, labels: np.ndarray, turns: Sequence[Turn], generation: bool) -> EncodedText:
        if len(ids) > self.max_tokens:
            lost = ids[self.max_tokens :]
            needed = [*dataclasses.astuple(self.special), *SENTINELS.values()]
            if generation or np.isin(lost, needed).any():
                raise UserError(
                    f"a turn of {len(ids)} ids is longer than max_tokens = {self.max_tokens} and the cut would take "
                    f"special tokens or the question; shorten it or raise max_tokens: {turns[0].text[:80]!r}"
                )
            ids, labels = ids[: self.max_tokens], labels[: self.max_tokens]
        return EncodedText(
            input_ids=ids,
            labels=labels,
            spans=find_spans(ids, self.special),
            segs=np.flatnonzero(ids == self.special.seg),
            images=np.flatnonzero(ids == SENTINELS[IMAGE]),
            regions=np.flatnonzero(ids == SENTINELS[REGION]),
        )

    def _stop_ids(self) -> tuple[int, ...]:
        example = [Turn("user", "a"), Turn("assistant", "b")]
        suffix = [text for text, supervised in _chunks(self._text(example, False)) if supervised][-1:]
        ids = self.tokenizer(suffix[0], add_special_tokens=False)["input_ids"] if suffix else []
        stops = {ids[0]} if len(ids) == 1 and suffix != ["b"] else set()
        if not stops:
            raise UserError(
                f"chat template: an answer must end with one token inside {{% generation %}} marks, but its last chunk "
                f"is {suffix} = ids {ids}; use the template that belongs to this tokenizer, or 'plain'"
            )
        return tuple(sorted(stops | ({self.tokenizer.eos_token_id} - {None})))

    def _pieces(self, ids: Sequence[int], style: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield (text, style) of stretches of equal style; sentinels stand alone."""
        names = {value: name for name, value in SENTINELS.items()}
        run: list[int] = []
        for k, (token, mark) in enumerate(zip(ids, style, strict=True)):
            if token in names:
                yield names[token], mark
                continue
            run.append(token)
            if k + 1 == len(ids) or style[k + 1] != mark or ids[k + 1] in names:
                yield self.tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False), mark
                run = []


def surviving(formatted: Formatted, text: EncodedText) -> Formatted:
    """Drop the queries and prompts whose ``<SEG>``, spans or ``<region>`` fell to the length limit.

    Turn pairs are dropped from the end, so what is left keeps its ordinals.
    """
    spans, segs = len(text.spans), len(text.segs)
    queries = [q for q in formatted.queries if (q.seg is None or q.seg < segs) and all(c < spans for c in q.concepts)]
    return dataclasses.replace(formatted, queries=tuple(queries), prompts=formatted.prompts[: len(text.regions)])


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compiled templates stay out of the encoder, because data loader workers pickle it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    return environment.from_string(template)


def _chunks(marked: str) -> Iterator[tuple[str, bool]]:
    """Yield (chunk, supervised): rendered text cut at the marks and at the sentinels; no chunk is empty."""
    for part in marked.replace(OPEN, CLOSE + OPEN).split(CLOSE):
        supervised = part.startswith(OPEN)
        for chunk in SENTINEL_PATTERN.split(part.removeprefix(OPEN)):
            if chunk:
                yield chunk, supervised


def _bos(tokenizer: Any, template: str) -> list[int]:
    """The ids before the first turn: BOS where the tokenizer has one that starts texts.

    Llama and Phi-3 have one (although Phi-3's own config no longer adds it); Qwen has none; for GPT-2 and SmolLM2 the
    BOS name is the end-of-text or turn marker under another name, and is not put before a conversation.
    """
    bos = tokenizer.bos_token
    if bos is None or bos in template or "bos_token" in template:
        return []
    adds = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if adds or bos != tokenizer.eos_token else []
