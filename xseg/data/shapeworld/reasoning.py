"""Questions about a scene that take a step of thought before anything can be pointed at (reasoning segmentation).

Some need knowledge ("What could roll?"), some a comparison of everything ("Which is the odd one out?"), some a look at
one thing to find another. The answer is one thing, computed from the scene; where two people could give two answers,
nothing is asked.

The explanation walks to the answer in steps that can each be read off the picture: where things must be compared, it
says the word that matters for each of them, behind its square, before it draws the conclusion.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xseg.data.shapeworld.board import SQUARES, square
from xseg.data.shapeworld.language import SIDES, Form, Noun, article, evaluate, look, word
from xseg.data.shapeworld.world import Scene, ground_map

TYPES = ("shape", "ground", "odd", "alike")
SHAPE_CLAUSES: dict[str, tuple[tuple[str, ...], str]] = {
    "could roll": (("circle", "ring"), "has no corner"),
    "has three corners": (("triangle",), "has three corners"),
    "has four corners": (("square", "bar"), "has four corners"),
    "has five points": (("star",), "has five points"),
    "has a hole": (("ring",), "has a hole"),
}
"""What is asked -> the shapes of which it is true, and why."""
GROUND_CLAUSES = {
    "would get wet": ("water", "What is on the water gets wet."),
    "seems to fly": ("sky", "What is in the sky seems to fly."),
    "stands on a lawn": ("grass", "A lawn is grass."),
    "is on a beach": ("sand", "A beach is sand."),
}
"""What is asked -> the ground of which it is true, and why."""
ON, OFF = 0.9, 0.1
"""A thing is on a ground with at least, and off it with at most, this part of its pixels; between them nothing is
asked."""
LEAST_ODD = 3
"""Fewest things among which one can be the odd one."""
LEAST_ALIKE = 2
"""With so few things "the other one" takes no look."""
SENTENCES = 0.5
"""How often a whole question is asked rather than a phrase named."""


@dataclass(frozen=True)
class Riddle:
    """One question, or phrase, with its only right answer."""

    type: str
    """One of ``TYPES``."""
    text: str
    is_sentence: bool
    thing: int
    """Index into ``Scene.things``, which holds others too."""
    explanation: str
    """What there is to compare, or what the thing looks like, and why, a sentence each."""


Found = tuple[str, str, int, str] | None
"""(sentence, phrase, thing, why)."""


def riddles(scene: Scene, rng: np.random.Generator, count: int) -> list[Riddle]:
    """Draw at most ``count`` riddles of different types."""
    out: list[Riddle] = []
    for kind in rng.permutation(list(TYPES)):
        found = ASK[str(kind)](scene, rng)
        if found is not None:
            sentence, phrase, thing, why = found
            is_sentence = bool(rng.random() < SENTENCES)
            out.append(Riddle(str(kind), sentence if is_sentence else phrase, is_sentence, thing, why))
    return out[:count]


def _one(rows: list[int], scene: Scene) -> bool:
    """Whether the rows are one thing among several."""
    return len(rows) == 1 < len(scene.things)


def _shape(scene: Scene, rng: np.random.Generator) -> Found:
    options = []
    for clause, (shapes, why) in SHAPE_CLAUSES.items():
        rows = [i for i, thing in enumerate(scene.things) if thing.shape in shapes]
        if _one(rows, scene):
            thing = scene.things[rows[0]]
            reason = f"{article(thing.shape).capitalize()} {why}. It is the {look(thing).text()}."
            options.append((clause, rows[0], reason))
    if not options:
        return None
    clause, row, reason = options[int(rng.integers(len(options)))]
    return f"What {clause}?", f"the one that {clause}", row, reason


def shares(scene: Scene, ground: str) -> list[float]:
    """Return the part of each thing's visible pixels, 0..1, behind which a ground of the scene lies."""
    band = ground_map(scene.ground, scene.side) == scene.ground.names.index(ground) + 1
    return [float(band[scene.visible(i)].mean()) for i in range(len(scene.things))]


def _seen(scene: Scene, words: Sequence[str]) -> str:
    """Return the sentence that lists a word of each thing behind its square, as one reads: who compares the things must
    have looked at every one of them."""
    told = zip(map(square, scene.things), words, strict=True)
    return f"I see {', '.join(' '.join(pair) for pair in sorted(told, key=lambda pair: SQUARES.index(pair[0])))}."


def _ground(scene: Scene, rng: np.random.Generator) -> Found:
    options = []
    on = {name: shares(scene, name) for name in scene.ground.names}
    behind = [max(on, key=lambda name: on[name][i]) for i in range(len(scene.things))]
    for clause, (name, reason) in GROUND_CLAUSES.items():
        if name not in on:
            continue
        parts = on[name]
        rows = [i for i, share in enumerate(parts) if share >= ON]
        if _one(rows, scene) and not any(OFF < share < ON for share in parts):
            options.append((clause, rows[0], f"{_seen(scene, behind)} {reason}"))
    if not options:
        return None
    clause, thing, reason = options[int(rng.integers(len(options)))]
    return f"What {clause}?", f"the one that {clause}", thing, reason


def _odd(scene: Scene, rng: np.random.Generator) -> Found:
    """One thing differs where all others agree; asked only where no second thing could be meant."""
    if len(scene.things) < LEAST_ODD:
        return None
    found: dict[int, str] = {}
    seen = []
    for attribute in ("colour", "shape", "texture", "size"):
        values = [getattr(thing, attribute) for thing in scene.things]
        seen.append(_seen(scene, values))
        (common, most), *rest = Counter(values).most_common()
        if len(rest) == 1 and most == len(values) - 1:
            others = Noun(shape=common).text(plural=True) if attribute == "shape" else common
            # the first attribute in which it differs is reason enough
            found.setdefault(values.index(rest[0][0]), f"{' '.join(seen)} All the others are {others}.")
    if len(found) != 1:
        return None
    ((thing, why),) = found.items()
    return "Which is the odd one out?", "the odd one out", thing, why


def _alike(scene: Scene, rng: np.random.Generator) -> Found:
    """The other thing with the colour or the shape of the one that stands farthest to a side."""
    options = []
    for side in SIDES:
        form = Form(Noun(), order=(side, 1))
        anchors = evaluate(form, scene)
        if anchors is None or len(scene.things) <= LEAST_ALIKE:
            continue
        (anchor,) = anchors
        for attribute in ("colour", "shape"):
            value = getattr(scene.things[anchor], attribute)
            rows = [i for i, t in enumerate(scene.things) if i != anchor and getattr(t, attribute) == value]
            if len(rows) == 1:
                options.append((attribute, word(form), anchor, rows[0]))
    if not options:
        return None
    attribute, words, anchor, thing = options[int(rng.integers(len(options)))]
    values = [getattr(thing, attribute) for thing in scene.things]
    value = values[anchor]
    told = value if attribute == "colour" else article(value)
    clause = f"has the {attribute} of {words}"
    why = f"{_seen(scene, values)} {words.capitalize()}, {square(scene.things[anchor])}, is {told}."
    return f"What else {clause}?", f"the other one that {clause}", thing, why


ASK: dict[str, Callable[[Scene, np.random.Generator], Found]] = {
    "shape": _shape,
    "ground": _ground,
    "odd": _odd,
    "alike": _alike,
}
"""Type -> how it is asked."""
