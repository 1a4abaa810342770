"""Questions about a scene with short answers, balanced so that a model that never looks gains little.

Where an answer is drawn first (yes or no, a number), the same wording serves every answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xseg.data.shapeworld.board import place_of
from xseg.data.shapeworld.language import (
    RELATIONS,
    Noun,
    Nouns,
    absent,
    article,
    choose,
    expressions,
    holds,
    naming,
    nouns_of,
)
from xseg.data.shapeworld.world import COLOURS, GROUNDS, Scene, shapes_of

COUNT_SHARES = (0.05, 0.12, 0.11, 0.23, 0.49)
"""How often the answers 0 to 4 are tried; many are rarely found, so that the answers come out about equal."""
QUESTION_TYPES = ("presence", "colour", "shape", "count", "position", "relation", "ground")
MIDDLE = 0.08
"""Things nearer than this to a middle line have no corner."""


@dataclass(frozen=True)
class Question:
    """One question with its only right answer."""

    type: str
    text: str
    answer: str


def questions(
    scene: Scene, rng: np.random.Generator, count: int, types: Sequence[str] = QUESTION_TYPES
) -> list[Question]:
    """Draw at most ``count`` different questions, of as many of the ``types`` as there are."""
    nouns = nouns_of(scene)
    out: dict[str, Question] = {}
    while count > len(out):
        before = len(out)
        for kind in rng.permutation(list(types)):
            found = _ask(str(kind), scene, nouns, rng)
            if found is not None and len(out) < count:
                out.setdefault(found.text, found)
        if len(out) == before:
            break
    return list(out.values())


def places(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Draw at most ``count`` questions for the square of what an expression means, as text."""
    out = []
    for found in expressions(scene, rng, count):
        out.append(Question("place", f"Where is {found.text}?", f"here {place_of(scene, found.things)}."))
    return out


def _ask(kind: str, scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Question | None:
    for _ in range(6):
        found = ASK[kind](scene, nouns, rng)
        if found is not None:
            return Question(kind, *found)
    return None


Asked = tuple[str, str] | None
Ask = Callable[[Scene, Nouns, np.random.Generator], Asked]


def _yes(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _presence(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    there = choose([n for n in nouns if 1 <= n.words() <= 2], rng)
    missing = absent(scene, nouns, rng, there)
    if there is None or missing is None:  # only what could be asked either way is asked
        return None
    noun, answer = (there, "yes") if _yes(rng) else (missing, "no")
    return f"Is there {article(noun.text())}?", answer


def _single(scene: Scene, nouns: Nouns, rng: np.random.Generator, asked: str | None) -> tuple[Noun, int] | None:
    """Draw a thing and a noun for it alone that does not mention the attribute ``asked``."""
    thing = int(rng.integers(len(scene.things)))
    options = {n: rows for n, rows in nouns.items() if asked is None or getattr(n, asked) is None}
    noun = naming(options, thing, rng)
    return None if noun is None or not noun.words() else (noun, thing)


def _colour(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    found = _single(scene, nouns, rng, "colour")
    return None if found is None else (f"What colour is the {found[0].text()}?", scene.things[found[1]].colour)


def _shape(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    found = _single(scene, nouns, rng, "shape")
    return None if found is None else (f"What shape is the {found[0].text('thing')}?", scene.things[found[1]].shape)


def _count(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    answer = int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    by_shape = _yes(rng)
    words = shapes_of(scene.policy) if by_shape else COLOURS
    options = [Noun(shape=w) if by_shape else Noun(colour=w) for w in words]
    fitting = [n for n in options if len(nouns.get(n, ())) == answer]
    if not fitting:
        return None
    noun = fitting[int(rng.integers(len(fitting)))]
    return f"How many {noun.text(plural=True)} are there?", str(answer)


def _position(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    found = _single(scene, nouns, rng, None)
    if found is None:
        return None
    x, y = scene.things[found[1]].centre
    if min(abs(x - 0.5), abs(y - 0.5)) < MIDDLE:
        return None
    corner = f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    return f"In which corner is the {found[0].text()}?", corner


def _relation(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    yes, relation = _yes(rng), str(rng.choice(list(RELATIONS)))
    first, second = _single(scene, nouns, rng, None), _single(scene, nouns, rng, None)
    if first is None or second is None or first[1] == second[1]:
        return None
    # the opposite must be clearly true of a "no", so that no answer is easier to see than the other
    subject, anchor = (first, second) if yes else (second, first)
    if not holds(relation, scene.things[subject[1]], scene.things[anchor[1]]):
        return None
    return f"Is the {first[0].text()} {relation} the {second[0].text()}?", "yes" if yes else "no"


def _ground(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Asked:
    yes = _yes(rng)
    name = str(rng.choice([g for g in GROUNDS if (g in scene.ground.names) == yes]))
    return f"Is there {name} in the picture?", "yes" if yes else "no"


ASK: dict[str, Ask] = {
    "presence": _presence,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "ground": _ground,
}
"""Question type -> how it is asked."""
