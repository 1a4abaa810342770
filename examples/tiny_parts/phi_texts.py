"""What the miniature language model reads (``phi.py``): scenes as boards in words, and what is said about them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xseg.data.shapeworld.board import BARE, COVERED, MOST, NOWHERE, SQUARES, board, place_of, square
from xseg.data.shapeworld.language import (
    ATTRIBUTES,
    Kind,
    Noun,
    Nouns,
    descriptions,
    draw_expression,
    expressions,
    look,
    nouns_of,
)
from xseg.data.shapeworld.questions import questions
from xseg.data.shapeworld.reasoning import ON, TYPES, Riddle, riddles, shares
from xseg.data.shapeworld.world import (
    COLOURS,
    GROUNDS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    Variant,
    allowed,
    sample_scene,
)
from xseg.encode import Encoder
from xseg.tasks import phrasing
from xseg.tokens import IGNORE_LABEL, IMAGE, SEG, SENTINELS, add_special_tokens
from xseg.types import Turn

SEED, SIDE, BATCH, WIDTH = 3, 48, 16, 160
LOOKS, LINES = 1000, 3500
"""Steps after which more is asked than look-ups, and after which lines become conversations."""
GROUNDS_FROM, GROUNDS_TO = 7500, 8100
"""Between these steps lines about the grounds come back: whether one is there stays at chance without them."""
MIXED = 3
"""After ``LINES`` every third step stays one of lines."""
HARD = ("relation", "ground")
"""Questions that come more often: in equal shares they stay at chance when all others are learnt."""
QUESTION_WEIGHT, SHORT_WEIGHT, SHORT = 0.05, 3.0, 3
"""Weights in the loss: of what the user says; of squares and of answers of at most ``SHORT`` tokens. The rest counts 1.
Without them the long descriptions drown the answers that take a step of thought."""
HERE = "here "
"""Stands before a square in the answer to a request for a mask, where ``<SEG>`` stands later."""
READS, RIDDLES = 10100, 10600
"""Between these steps nothing is asked but what stands on which square, of busy scenes: in others the commonest colour
is right so often that reading a square is never learnt. From the second on half of all that is said is riddles: two a
conversation did not teach them."""
VALUES = {"size": SIZES, "colour": COLOURS, "texture": TEXTURES, "shape": SHAPES}
TEMPLATE = Path(__file__).parents[2] / "chat_templates/phi3.jinja"
ROW = -2
"""Id of a place where a square of the board stands; the words of the squares come beside the ids."""
Pairs = list[tuple[str, str]]
"""(question, answer)."""


def scene(number: int, variant: Variant = "easy") -> Scene:
    """Return scene ``number`` of this script's own stream."""
    return sample_scene(SEED, number, side=SIDE, variant=variant, policy="open" if number % 2 else "seen")


def look_ups(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw 16 look-ups: from words to a square, from a square to words, and to every square that some words fit."""
    nouns, out, told = nouns_of(world), Pairs(), board(world)
    while len(out) < 16:
        thing = world.things[int(rng.integers(len(world.things)))]
        way = rng.integers(5)
        if way == 0:
            *words, name = told[int(rng.integers(len(told)))]
            out.append((name, " ".join(words)))
        elif way == 1 and len(nouns[look(thing)]) == 1:
            out.append((f"the {look(thing).text()}", square(thing)))
        elif way == 2:
            out += _told(world, nouns, "attribute", rng)
        elif way == 3:
            out.append(ground(world, rng))
        else:
            noun, places = filtered(world, rng)
            out.append((f"every {noun}", places))
    return out


def ground(world: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return which grounds there are, in the order of the alphabet, or of one of them whether it is bare or nowhere."""
    if rng.random() < 0.5:
        return "picture", " ".join(sorted(world.ground.names))
    name = str(rng.choice(GROUNDS))
    return name, BARE if name in world.ground.names else NOWHERE


def grounds(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw lines of every kind, about half of them about the grounds."""
    found = [ground(world, rng) for _ in range(4)] + everything(world, rng)[:8]
    found += [(q.text, q.answer) for q in questions(world, rng, 2, ("ground",))]
    return [found[i] for i in rng.permutation(len(found))]


def _told(world: Scene, nouns: Nouns, kind: Kind, rng: np.random.Generator) -> Pairs:
    found = draw_expression(world, nouns, kind, rng)
    return [] if found is None else [(found.text, place_of(world, found.things))]


def filtered(world: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Draw one or two attributes; return their words and the squares of all they fit, of something half of the time."""
    like = world.things[rng.integers(len(world.things))]
    names = [str(n) for n in rng.choice(ATTRIBUTES, rng.integers(1, 3), False)]
    values = {n: getattr(like, n) for n in names}
    if rng.random() < 0.5:
        values[names[0]] = str(rng.choice(VALUES[names[0]]))
    noun = Noun(**values)
    if not allowed(noun.colour or "", noun.shape or SHAPES[0], "open"):
        noun = replace(noun, colour=None)
    places = [square(t) for t in world.things if noun.fits(t)]
    return noun.text(), " ".join(sorted(places, key=SQUARES.index)) or NOWHERE


def everything(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw lines of every kind: look-ups, expressions and questions."""
    found = look_ups(world, rng)[:4] + [(e.text, place_of(world, e.things)) for e in expressions(world, rng, 6)]
    found += [ground(world, rng), ground(world, rng)]
    found += _asked(world, rng)
    return [found[i] for i in rng.permutation(len(found))]


def _asked(world: Scene, rng: np.random.Generator) -> Pairs:
    asked = [*questions(world, rng, 6), *questions(world, rng, 5, HARD), *questions(world, rng, 2, ("ground",))]
    return [(q.text, q.answer) for q in asked]


def conversation(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw what a user asks: descriptions, or questions and requests for masks."""
    if rng.random() < 0.25:
        found = descriptions(world, rng)
    else:
        found = _asked(world, rng)
        found += [refer(e.text, place_of(world, e.things), rng) for e in expressions(world, rng, 5)]
    return [found[i] for i in rng.permutation(len(found))]


def riddled(world: Scene, rng: np.random.Generator) -> list[Riddle]:
    """Draw at most three riddles, half as often the easy ones about a shape."""
    found = [r for r in riddles(world, rng, len(TYPES)) if r.type != "shape" or rng.random() < 0.5]
    return found[:3]


def reads(world: Scene, rng: np.random.Generator) -> Pairs:
    """Return lists of every size, colour, texture and shape by square, each in a random order."""
    told = {square(thing): thing for thing in world.things}
    orders = {str(name): rng.permutation(sorted(told)) for name in rng.permutation(ATTRIBUTES)}
    return [
        (f"every {name}", ", ".join(f"{place} {getattr(told[place], name)}" for place in order))
        for name, order in orders.items()
    ]


def standing(world: Scene) -> Pairs:
    """Return on which ground each thing is, by its square, and all squares of things on each ground."""
    found = Pairs()
    for name in world.ground.names:
        on = [square(t) for t, share in zip(world.things, shares(world, name), strict=True) if share >= ON]
        found += [(f"under {place}", name) for place in on]
        found.append((f"on the {name}", " ".join(sorted(on, key=SQUARES.index)) or NOWHERE))
    return found


def riddle_lines(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw lines of every kind, about half of them riddles, answered by a square or a reason, and what is on what."""
    found = everything(world, rng)[:9] + reads(world, rng)[:2]
    for r in riddled(world, rng):
        found += [(r.text, square(world.things[r.thing])), (f"explain {r.text.lower()}", r.explanation)]
    found += standing(world)
    return [found[i] for i in rng.permutation(len(found))]


def riddle_talk(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw a conversation of riddles, and as much of what else is asked."""
    return [riddle(r, world, rng) for r in riddled(world, rng)] + conversation(world, rng)[:6]


def refer(text: str, place: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a request for the mask of a thing, answered by the square it stands on."""
    question = phrasing.pick(phrasing.PHRASE, rng, True).format(phrase=text)
    return question, phrasing.pick(phrasing.ANSWER, rng, True).replace(SEG, f"{HERE}{place}")


def riddle(found: Riddle, world: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return a question that takes a step of thought, answered by the reason, the square, and a request's answer."""
    place = square(world.things[found.thing])
    answer = phrasing.pick(phrasing.ANSWER, rng, True).replace(SEG, f"{HERE}{place}")
    return phrasing.pick(phrasing.EXPLAIN, rng, True).format(
        phrase=found.text
    ), f"{found.explanation} {place}. {answer}"


Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids (n), ``ROW`` where a square stands; words (36 or 72, MOST) of the squares, -1 = none; weights (n) in the loss."""


class Texts:
    """Scenes and what is said about them, as ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.size = len(tokenizer)
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        told = (*SQUARES, NOWHERE, COVERED, BARE, *GROUNDS, *SIZES, *COLOURS, *TEXTURES, *SHAPES)
        self.ids = {word: self._ids(word)[0] for word in told}
        self.squares = [self.ids[word] for word in (*SQUARES, NOWHERE)]
        # the encoder wants xseg's own tokens; nothing of these texts uses them
        add_special_tokens(tokenizer)
        self.encoder = Encoder(tokenizer, TEMPLATE.read_text(encoding="utf8"), 4096)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _board(self, world: Scene, twice: bool) -> np.ndarray:
        out = np.full((len(SQUARES), MOST), -1)
        for row, told in zip(out, board(world), strict=True):
            row[: len(told)] = [self.ids[word] for word in told]
        return np.repeat(out, 2, axis=0) if twice else out

    def lines(self, world: Scene, pairs: Pairs, twice: bool = False) -> Sample:
        """Return a board and then lines, each a question, its answer and the end token."""
        told = self._board(world, twice)
        ids, weights = [self.tokenizer.bos_token_id] + [ROW] * len(told), [0.0] * (len(told) + 1)
        for question, answer in pairs:
            asked, said = self._ids(question), [*self._ids(answer), self.end]
            ids += asked + said
            weights += [QUESTION_WEIGHT] * len(asked) + [1.0] * len(said)
        return np.array(ids), told, np.array(weights, np.float32)

    def chat(self, world: Scene, pairs: Pairs, twice: bool = False) -> Sample:
        """Return a conversation whose image is the board."""
        turns = [t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))]
        turns[0] = Turn("user", f"{IMAGE}\n{turns[0].text}")
        text, told = self.encoder.encode(turns), self._board(world, twice)
        place = int(np.flatnonzero(text.input_ids == SENTINELS[IMAGE])[0])
        rows = np.full(len(told), ROW)
        ids = np.concatenate([text.input_ids[:place], rows, text.input_ids[place + 1 :]])
        said = np.concatenate([text.labels[:place], np.full(len(told), IGNORE_LABEL - 1), text.labels[place + 1 :]])
        weight = np.where(said >= 0, 1.0, np.where(said == IGNORE_LABEL, QUESTION_WEIGHT, 0.0))
        weight[:place] = 0.0
        edges = np.flatnonzero(np.diff(said >= 0, prepend=False, append=False))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            short = last - first <= SHORT + 1  # with the token that ends an answer
            weight[first:last] = np.where(short | np.isin(ids[first:last], self.squares), SHORT_WEIGHT, 1.0)
        return ids, told, weight.astype(np.float32)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (B, n), padded on the right, words of squares and weights of a process's share of a step.

        Every second batch tells each square twice, as the two image encoders will.
        """
        rows = []
        for k in range(rank, BATCH, world):
            number = SPLITS["parts"][0] + step * BATCH + k
            reading = READS <= step < RIDDLES
            world, rng = scene(number, "hard" if reading else "easy"), np.random.default_rng([SEED, number, 1])
            ask = grounds if GROUNDS_FROM <= step < GROUNDS_TO else everything if step >= LOOKS else look_ups
            if step >= READS:
                ask = reads if reading else riddle_lines
            if step < LINES or step % MIXED == 0 or ask in (grounds, reads):
                rows.append(self.lines(world, ask(world, rng), step % 2 == 1))
            else:
                talk = riddle_talk(world, rng) if step >= RIDDLES else conversation(world, rng)
                rows.append(self.chat(world, talk, step % 2 == 1))
        return together(rows)


def together(rows: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad samples on the right, with weight 0."""
    length = max(len(ids) for ids, _, _ in rows)
    ids, weights = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.float32)
    for k, (row, _, weight) in enumerate(rows):
        ids[k, : len(row)], weights[k, : len(row)] = row, weight
    return torch.from_numpy(ids), torch.from_numpy(np.stack([told for _, told, _ in rows])), torch.from_numpy(weights)
