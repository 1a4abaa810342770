"""Sentences about a scene whose truth is computed, never guessed: descriptions, referring expressions, captions.

An expression is a ``Form`` and its wording. ``evaluate`` is the only judge of what a form refers to; it answers None
where a person could disagree (shapes nearly level, several anchors), and such forms are never uttered.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from xseg.data.shapeworld.board import BARE, SQUARES, board, square
from xseg.data.shapeworld.world import (
    COLOURS,
    GROUNDS,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    Thing,
    allowed,
    sample_scene,
    shapes_of,
)

Kind = Literal["attribute", "ordinal", "relation", "no-target"]
KINDS: tuple[Kind, ...] = ("attribute", "ordinal", "relation", "no-target")
SHARES = (0.42, 0.24, 0.24, 0.1)
"""How often each kind is drawn."""
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
"""Side -> (axis of the centre, sign) by which shapes are counted from it."""
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ATTRIBUTES = ("size", "colour", "texture", "shape")
TRIES = 20
READ = 8
"""Squares whose words a description gives."""
GAP = 0.06
"""Least difference of two centres, as a part of the side, that is called an order or a relation."""
SLOPE = 0.6
"""A is left of B where the step to the left is at least this part of the step up or down; likewise the others."""


@dataclass(frozen=True)
class Noun:
    """A description by attributes; None = not mentioned."""

    size: str | None = None
    colour: str | None = None
    texture: str | None = None
    shape: str | None = None
    without: str | None = None
    """A colour or texture that the thing does not have."""

    def fits(self, thing: Thing) -> bool:
        """Whether the description is true of the thing."""
        wrong = any(getattr(self, a) not in (None, getattr(thing, a)) for a in ATTRIBUTES)
        return not wrong and self.without not in (thing.colour, thing.texture)

    def text(self, head: str = "shape", plural: bool = False) -> str:
        """The words, without an article; ``head`` stands for an unnamed shape."""
        noun = self.shape or head
        noun += ("es" if noun.endswith("s") else "s") if plural else ""
        words = [w for w in (self.size, self.colour, self.texture, noun) if w]
        return " ".join(words) + (f" that is not {self.without}" if self.without else "")

    def words(self) -> int:
        """Number of attributes mentioned."""
        return sum(getattr(self, a) is not None for a in (*ATTRIBUTES, "without"))


@dataclass(frozen=True)
class Form:
    """What an expression means: the things a noun fits, narrowed by an order or by a relation."""

    noun: Noun
    order: tuple[str, int] | None = None
    """(side, k): the k-th from that side, from 1."""
    relation: tuple[str, Noun] | None = None
    """(relation, anchor): those that stand so to the one thing the anchor fits."""


@dataclass(frozen=True)
class Expression:
    """A referring expression with its truth."""

    text: str
    kind: Kind
    form: Form
    things: tuple[int, ...]
    """Indices into ``Scene.things``: one, or none for "no-target"."""


Nouns = dict[Noun, tuple[int, ...]]


def nouns_of(scene: Scene) -> Nouns:
    """Every description by attributes that fits something in the scene -> the things it fits."""
    subsets = [s for n in range(len(ATTRIBUTES) + 1) for s in combinations(ATTRIBUTES, n)]
    rows: dict[Noun, list[int]] = {}
    for number, thing in enumerate(scene.things):
        for subset in subsets:
            rows.setdefault(Noun(**{a: getattr(thing, a) for a in subset}), []).append(number)
    return {noun: tuple(r) for noun, r in rows.items()}


def evaluate(form: Form, scene: Scene) -> frozenset[int] | None:
    """Return the things a form refers to, or None where the picture leaves room for doubt."""
    rows = [i for i, thing in enumerate(scene.things) if form.noun.fits(thing)]
    if form.order is not None:
        side, number = form.order
        axis, sign = SIDES[side]
        rows.sort(key=lambda i: sign * scene.things[i].centre[axis])
        places = [scene.things[i].centre[axis] for i in rows]
        if any(abs(b - a) < GAP for a, b in pairwise(places)):
            return None
        return frozenset(rows[number - 1 : number])
    if form.relation is not None:
        relation, anchor = form.relation
        anchors = [i for i, thing in enumerate(scene.things) if anchor.fits(thing)]
        if len(anchors) != 1:
            return None
        held = {i: holds(relation, scene.things[i], scene.things[anchors[0]]) for i in rows if i != anchors[0]}
        return None if None in held.values() else frozenset(i for i, value in held.items() if value)
    return frozenset(rows)


def holds(relation: str, thing: Thing, anchor: Thing) -> bool | None:
    """Whether the relation is clearly true, clearly false, or (None) neither."""
    axis, sign = RELATIONS[relation]
    step = sign * (thing.centre[axis] - anchor.centre[axis])
    aside = abs(thing.centre[1 - axis] - anchor.centre[1 - axis])
    if step >= GAP and step >= SLOPE * aside:
        return True
    return False if step <= 0 else None


def word(form: Form) -> str:
    """Return the wording of a form, with its article, lower case."""
    text = form.noun.text()
    if form.order is not None:
        side, number = form.order
        if number == 1:
            return f"the {side}most {text}" if side != "top" else f"the topmost {text}"
        return f"the {ORDINALS[number - 1]} {text} from the {side}"
    if form.relation is not None:
        return f"the {text} {form.relation[0]} the {form.relation[1].text()}"
    return f"the {text}"


def expressions(scene: Scene, rng: np.random.Generator, count: int) -> list[Expression]:
    """Draw at most ``count`` different expressions; about a tenth refers to nothing."""
    nouns = nouns_of(scene)
    out: dict[str, Expression] = {}
    for _ in range(count):
        kind = KINDS[int(rng.choice(len(KINDS), p=SHARES))]
        found = draw_expression(scene, nouns, kind, rng) or draw_expression(scene, nouns, "attribute", rng)
        if found is not None:
            out.setdefault(found.text, found)
    return list(out.values())


def draw_expression(scene: Scene, nouns: Nouns, kind: Kind, rng: np.random.Generator) -> Expression | None:
    """Draw one expression of a kind, or None where the scene seems to have none."""
    wanted = 0 if kind == "no-target" else 1
    for _ in range(TRIES):
        form = PROPOSE[kind](scene, nouns, rng)
        things = None if form is None else evaluate(form, scene)
        if form is not None and things is not None and len(things) == wanted:
            return Expression(word(form), kind, form, tuple(sorted(things)))
    return None


def choose(options: list[Noun], rng: np.random.Generator) -> Noun | None:
    """Draw a noun, short ones and those that name the shape more often; None from nothing."""
    if not options:
        return None
    weights = np.array([_weight(noun) for noun in options])
    return options[int(rng.choice(len(options), p=weights / weights.sum()))]


@cache
def _weight(noun: Noun) -> float:
    return (1.0 if noun.shape is None else 4.0) * 2.0 ** -noun.words()


def naming(nouns: Nouns, thing: int, rng: np.random.Generator, redundant: float = 0.25) -> Noun | None:
    """Draw a noun that fits this thing alone; at most ``redundant`` of them hold a word that could be left out."""
    alone = [noun for noun, rows in nouns.items() if rows == (thing,)]
    if rng.random() >= redundant:
        alone = [n for n in alone if all(len(nouns[shorter]) > 1 for shorter in _shorter(n))]
    return choose(alone, rng)


@cache
def _shorter(noun: Noun) -> tuple[Noun, ...]:
    return tuple(replace(noun, **{a: None}) for a in ATTRIBUTES if getattr(noun, a) is not None)


def _attribute(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Form | None:
    thing = int(rng.integers(len(scene.things)))
    if rng.random() < 0.2:
        base = choose([n for n, rows in nouns.items() if len(rows) > 1 and thing in rows], rng)
        other = scene.things[int(rng.integers(len(scene.things)))]
        attribute = ("colour", "texture")[int(rng.integers(2))]
        if base is not None and getattr(base, attribute) is None:
            return Form(replace(base, without=getattr(other, attribute)))
    noun = naming(nouns, thing, rng)
    return None if noun is None else Form(noun)


def _ordinal(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Form | None:
    noun = choose([n for n, rows in nouns.items() if 1 < len(rows) <= len(ORDINALS)], rng)
    if noun is None:
        return None
    return Form(noun, order=(_side(rng), int(rng.integers(len(nouns[noun]))) + 1))


def _side(rng: np.random.Generator) -> str:
    return str(rng.choice(list(SIDES)))


def _relation(scene: Scene, nouns: Nouns, rng: np.random.Generator, least: int = 2) -> Form | None:
    """The noun alone fits at least ``least`` things besides the anchor, so that the relation must be read."""
    place = int(rng.integers(len(scene.things)))
    noun = choose([n for n, rows in nouns.items() if len(rows) - (place in rows) >= least], rng)
    anchor = None if noun is None else naming(nouns, place, rng, redundant=0.0)
    if noun is None or anchor is None:
        return None
    return Form(noun, relation=(str(rng.choice(list(RELATIONS))), anchor))


def _nothing(scene: Scene, nouns: Nouns, rng: np.random.Generator) -> Form | None:
    """Forms that sound right and refer to nothing; half are absent things, a quarter each orders and relations."""
    way = rng.random()
    if way < 0.5:
        noun = absent(scene, nouns, rng)
        return None if noun is None else Form(noun)
    if way < 0.75:
        noun = choose([n for n, rows in nouns.items() if len(rows) < len(ORDINALS)], rng)
        return None if noun is None else Form(noun, order=(_side(rng), len(nouns[noun]) + 1))
    return _relation(scene, nouns, rng, least=1)


def absent(scene: Scene, nouns: Nouns, rng: np.random.Generator, like: Noun | None = None) -> Noun | None:
    """Draw a noun that fits nothing but nearly does: one attribute of a fitting noun (of ``like``) is changed.

    Words are taken from the scene where that works half of the time, and only words its policy allows.
    """
    if like is None:
        like = choose([n for n in nouns if 1 <= n.words() <= 3], rng)
    if like is None:
        return None
    attribute = str(rng.choice([a for a in ATTRIBUTES if getattr(like, a) is not None]))
    vocabulary = {"size": SIZES, "colour": COLOURS, "texture": TEXTURES, "shape": shapes_of(scene.policy)}[attribute]
    here = sorted({getattr(thing, attribute) for thing in scene.things})
    for pool in (here, vocabulary) if rng.random() < 0.5 else (vocabulary,):
        for value in rng.permutation(pool):
            noun = replace(like, **{attribute: str(value)})
            if noun not in nouns and _sayable(noun, scene):
                return noun
    return None


def _sayable(noun: Noun, scene: Scene) -> bool:
    return noun.colour is None or noun.shape is None or allowed(noun.colour, noun.shape, scene.policy)


PROPOSE = {"attribute": _attribute, "ordinal": _ordinal, "relation": _relation, "no-target": _nothing}


def article(text: str) -> str:
    """Put "a" or "an" before a noun."""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one short true sentence that names every thing by colour and shape, and every ground."""
    return in_words(scene, looks(scene, rng))


def in_words(scene: Scene, parts: list[tuple[str, tuple[int, ...]]]) -> str:
    """Return the caption that names the things by ``parts``, as ``looks`` returns them."""
    return f"{listed([text for text, _ in parts])} on {listed(list(scene.ground.names))}."


def looks(scene: Scene, rng: np.random.Generator) -> list[tuple[str, tuple[int, ...]]]:
    """Return what there is by colour and shape, in random order: words such as "two red bars", and the things."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, thing in enumerate(scene.things):
        groups.setdefault((thing.colour, thing.shape), []).append(number)
    parts = []
    for place in rng.permutation(len(groups)):
        (colour, shape), rows = list(groups.items())[place]
        noun = Noun(colour=colour, shape=shape)
        text = article(noun.text()) if len(rows) == 1 else f"{NUMBERS[len(rows)]} {noun.text(plural=True)}"
        parts.append((text, tuple(rows)))
    return parts


def descriptions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return five questions that ask for a description, with their answers: a caption, two orders, the places, and
    what some squares hold.
    """
    places = sorted(scene.things, key=lambda t: SQUARES.index(square(t)))
    return [
        *_orders(scene, rng),
        ("Where is everything?", f"{listed([f'{_full(t)} at {square(t)}' for t in places])}."),
        # a stream of its own, so that these draws move none of the caller's
        ("What is on some squares?", f"{', '.join(_read(scene, rng.spawn(1)[0]))}."),
    ]


def _orders(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """The descriptions that name no square."""
    across, down = (sorted(scene.things, key=lambda t: t.centre[axis]) for axis in (0, 1))
    return [
        ("Describe the picture.", caption(scene, rng)),
        ("Name everything from left to right.", f"{listed([_full(t) for t in across])}."),
        ("Name everything from top to bottom.", f"{listed([_full(t) for t in down])}."),
    ]


def _read(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The words of ``READ`` squares, half of the time one that shows a thing."""
    told = board(scene)
    shown = np.array([words[0] != BARE for words in told])
    share = np.where(shown, 1 / shown.sum(), 1 / (~shown).sum())
    chosen = rng.choice(len(told), READ, replace=False, p=share / share.sum())
    return [" ".join((told[k][-1], *told[k][:-1])) for k in chosen]


def look(thing: Thing) -> Noun:
    """Return the noun that tells all that a thing looks like."""
    return Noun(**{a: getattr(thing, a) for a in ATTRIBUTES})


def _full(thing: Thing) -> str:
    return article(look(thing).text())


def listed(parts: list[str]) -> str:
    """Join with commas and an \"and\" before the last part."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def corpus(count: int, seed: int) -> Iterator[str]:
    """Yield the sentences of ``count`` scenes that no stage and no suite uses; held-out shapes occur, pairs do not."""
    from xseg.data.shapeworld.questions import questions

    yield from GROUNDS
    for number in range(count):
        policy = "open" if number % 2 else SPLITS["parts"][1]
        scene = sample_scene(seed, SPLITS["parts"][0] + number, side=64, policy=policy)
        rng = np.random.default_rng([seed, SPLITS["parts"][0] + number, 1])
        # without the squares: a piece must not hold a square and the sign behind it
        yield from (line for pair in _orders(scene, rng) for line in pair)
        yield from (e.text for e in expressions(scene, rng, 6))
        yield from (line for q in questions(scene, rng, 6) for line in (q.text, q.answer))
