"""The sentences are read by a parser that knows nothing of how they were made."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from xseg.data.shapeworld import language, questions
from xseg.data.shapeworld.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_SHAPES,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
)

ORDINALS = ["first", "second", "third", "fourth", "fifth"]


def fits(words: str, thing: Thing) -> bool:
    """Whether "large red circle that is not striped" is true of a thing."""
    words, _, without = words.partition(" that is not ")
    has = {thing.size, thing.colour, thing.texture, thing.shape, "shape", "thing"}
    return set(words.split()) <= has and without not in has


def meant(text: str, scene: Scene) -> list[int]:
    """The things an expression refers to, computed from its words."""
    body = text.removeprefix("the ")
    if match := re.fullmatch(r"(.+) (left of|right of|above|below) the (.+)", body):
        [anchor] = [t for t in scene.things if fits(match[3], t)]
        return [
            i
            for i, t in enumerate(scene.things)
            if t is not anchor and fits(match[1], t) and beyond(match[2], t, anchor) > 0
        ]
    number, side = 0, ""
    if match := re.fullmatch(r"(\w+) (.+) from the (\w+)", body):
        number, body, side = ORDINALS.index(match[1]), match[2], match[3]
    elif match := re.fullmatch(r"(left|right|top|bottom)most (.+)", body):
        side, body = match[1], match[2]
    rows = [i for i, t in enumerate(scene.things) if fits(body, t)]
    if not side:
        return rows
    rows.sort(key=lambda i: scene.things[i].centre[side in ("top", "bottom")], reverse=side in ("right", "bottom"))
    return rows[number : number + 1]


def beyond(relation: str, thing: Thing, anchor: Thing) -> float:
    (x, y), (ax, ay) = thing.centre, anchor.centre
    return {"left of": ax - x, "right of": x - ax, "above": ay - y, "below": y - ay}[relation]


def scenes(count: int, policy: str = "seen") -> list[tuple[Scene, np.random.Generator]]:
    variants = ("easy", "hard")
    return [
        (sample_scene(11, i, side=64, variant=variants[i % 4 == 3], policy=policy), np.random.default_rng([11, i, 1]))
        for i in range(count)
    ]


def test_every_expression_means_what_it_says() -> None:
    kinds: Counter[str] = Counter()
    for scene, rng in scenes(300):
        for expression in language.expressions(scene, rng, 6):
            assert meant(expression.text, scene) == list(expression.things), expression.text
            assert len(expression.things) == (expression.kind != "no-target")
            kinds[expression.kind] += 1
    share = {kind: n / sum(kinds.values()) for kind, n in kinds.items()}
    assert 0.06 < share["no-target"] < 0.14
    assert min(share[k] for k in ("attribute", "ordinal", "relation")) > 0.12


def test_orders_and_relations_must_be_read() -> None:
    for scene, rng in scenes(150):
        for expression in language.expressions(scene, rng, 6):
            noun = expression.form.noun
            if expression.kind in ("ordinal", "relation"):
                assert sum(noun.fits(thing) for thing in scene.things) >= 2, expression.text


def test_orders_and_relations_keep_a_clear_margin() -> None:
    checked = 0
    for scene, rng in scenes(150):
        for expression in language.expressions(scene, rng, 6):
            form = expression.form
            if form.order:
                axis = int(form.order[0] in ("top", "bottom"))
                rows = sorted(t.centre[axis] for t in scene.things if form.noun.fits(t))
                assert np.diff(rows).min(initial=1) >= 0.06, expression.text
            elif form.relation and expression.things:
                [anchor] = [t for t in scene.things if form.relation[1].fits(t)]
                assert beyond(form.relation[0], scene.things[expression.things[0]], anchor) >= 0.06
            checked += bool(form.order or form.relation)
    assert checked > 100


def test_answers_are_true() -> None:
    for scene, rng in scenes(300):
        for question in questions.questions(scene, rng, 6):
            assert answer(question.text, scene) == question.answer, question


def answer(text: str, scene: Scene) -> str:
    body = text.removesuffix("?")
    if match := re.fullmatch(r"Is there (\w+) in the picture", body):
        return yes(match[1] in scene.ground.names)
    if match := re.fullmatch(r"Is there an? (.+)", body):
        return yes(any(fits(match[1], t) for t in scene.things))
    if match := re.fullmatch(r"How many (.+?)(?:(?<=ss)es|s) are there", body):
        return str(sum(fits(match[1], t) for t in scene.things))
    if match := re.fullmatch(r"Is the (.+) (left of|right of|above|below) the (.+)", body):
        return yes(beyond(match[2], one(match[1], scene), one(match[3], scene)) > 0)
    if match := re.fullmatch(r"What (colour|shape) is the (.+)", body):
        return str(getattr(one(match[2], scene), match[1]))
    match = re.fullmatch(r"In which corner is the (.+)", body)
    assert match, text
    x, y = one(match[1], scene).centre
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


def yes(value: bool) -> str:
    return "yes" if value else "no"


def one(words: str, scene: Scene) -> Thing:
    [thing] = [t for t in scene.things if fits(words, t)]
    return thing


def test_answers_are_balanced() -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(500):
        scene, rng = sample_scene(13, index, side=48), np.random.default_rng([13, index, 1])
        for question in questions.questions(scene, rng, 6):
            counts[question.type][question.answer] += 1
    assert set(counts) == set(questions.ASK)
    for kind, found in counts.items():
        assert found.most_common(1)[0][1] / found.total() < 1.45 / len(found) + 0.02, (kind, found)
        assert found.total() > 200


@pytest.mark.parametrize("policy", ["seen", "open", "pairs"])
def test_words_follow_the_policy(policy: str) -> None:
    said: Counter[str] = Counter()
    for scene, rng in scenes(150, policy):
        lines = [e.text for e in language.expressions(scene, rng, 6)]
        lines += [q.text + " " + q.answer for q in questions.questions(scene, rng, 6)]
        lines.append(language.caption(scene, rng))
        for line in lines:
            singular = re.sub(r"(?<=ss)es\b|(?<!s)s\b", "", line)
            said.update(shape for shape in SHAPES if re.search(rf"\b{shape}\b", singular))
            # "purple triangle" and "purple plain triangle", but not "purple thing … triangle"
            found = re.findall(rf"({'|'.join(COLOURS)}) (?:plain |striped |dotted )?(\w+)", singular)
            said.update(pair for pair in found if pair in HELD_OUT_PAIRS)
    assert bool(set(said) & set(HELD_OUT_SHAPES)) == (policy == "open")
    assert bool(set(said) & set(HELD_OUT_PAIRS)) == (policy == "pairs")


def test_captions_count_right() -> None:
    for scene, rng in scenes(60):
        text = language.caption(scene, rng)
        things, ground = text.removesuffix(".").rsplit(" on ", 1)
        assert set(re.split(", | and ", ground)) == set(scene.ground.names)
        total = 0
        for part in re.split(", | and ", things):
            count, noun = part.split(" ", 1)
            number = 1 if count in ("a", "an") else language.NUMBERS.index(count)
            noun = noun if number == 1 else re.sub(r"(?<=ss)es$|s$", "", noun)
            assert sum(fits(noun, t) for t in scene.things) == number
            total += number
        assert total == len(scene.things)


def test_corpus_is_a_function_of_its_seed() -> None:
    first, again, other = (list(language.corpus(20, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) > 20 * 10
