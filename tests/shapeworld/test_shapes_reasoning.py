"""Riddles are solved from their words, by rules that know nothing of how they were made; captions from their spans."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from xseg.data.shapeworld.board import SQUARES, square
from xseg.data.shapeworld.grounded import grounded
from xseg.data.shapeworld.language import NUMBERS
from xseg.data.shapeworld.reasoning import GROUND_CLAUSES, SHAPE_CLAUSES, TYPES, Riddle, riddles
from xseg.data.shapeworld.world import Scene, ground_map, sample_scene
from xseg.paths import find

KNOWN = {
    "could roll": {"circle", "ring"},
    "has three corners": {"triangle"},
    "has four corners": {"square", "bar"},
    "has five points": {"star"},
    "has a hole": {"ring"},
}
PLACES = {"would get wet": "water", "seems to fly": "sky", "stands on a lawn": "grass", "is on a beach": "sand"}
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
LOOKS = ("colour", "shape", "texture", "size")


def drawn(count: int) -> list[tuple[Scene, list[Riddle]]]:
    out = []
    for i in range(count):
        scene = sample_scene(17, i, side=64, variant=("easy", "hard")[i % 4 == 3])
        out.append((scene, riddles(scene, np.random.default_rng([17, i]), 3)))
    return out


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, list[Riddle]]]:
    return drawn(300)


def solved(text: str, scene: Scene) -> list[int]:
    """Everything that a person could point at."""
    things = scene.things
    if "odd one out" in text:
        return [
            i
            for i, thing in enumerate(things)
            if any(
                len({getattr(t, a) for t in things if t is not thing}) == 1
                and getattr(thing, a) not in {getattr(t, a) for t in things if t is not thing}
                for a in LOOKS
            )
        ]
    match = re.fullmatch(r"(?:What|the one that)( else)? (.+?)\??|the other (one) that (.+)", text)
    assert match, text
    clause = match[2] or match[4]
    if match[1] or match[3]:
        attribute, side = re.fullmatch(r"has the (colour|shape) of the (\w+)most shape", clause).groups()
        axis, sign = SIDES[side]
        anchor = min(things, key=lambda t: sign * t.centre[axis])
        return [
            i for i, t in enumerate(things) if t is not anchor and getattr(t, attribute) == getattr(anchor, attribute)
        ]
    if clause in KNOWN:
        return [i for i, thing in enumerate(things) if thing.shape in KNOWN[clause]]
    bands = ground_map(scene.ground, scene.side)
    under = [bands[scene.visible(i)] for i in range(len(things))]
    wanted = scene.ground.names.index(PLACES[clause]) + 1
    return [i for i, band in enumerate(under) if np.bincount(band).argmax() == wanted]


def test_every_riddle_has_exactly_its_answer(asked: list[tuple[Scene, list[Riddle]]]) -> None:
    types: Counter[str] = Counter()
    for scene, found in asked:
        assert len({r.type for r in found}) == len(found) <= 3
        for riddle in found:
            assert solved(riddle.text, scene) == [riddle.thing], (riddle, scene.things)
            assert len(scene.things) > 1, "where there is one thing alone, nothing needs thought"
            assert riddle.text.endswith("?") == riddle.is_sentence == riddle.text[0].isupper()
            types[riddle.type] += 1
    assert set(types) == set(TYPES) and min(types.values()) > 30


def test_every_clause_is_asked_and_known_to_the_solver(asked: list[tuple[Scene, list[Riddle]]]) -> None:
    assert set(SHAPE_CLAUSES) == set(KNOWN) and set(GROUND_CLAUSES) == set(PLACES)
    texts = " ".join(r.text for _, found in asked for r in found)
    assert all(clause in texts for clause in (*KNOWN, *PLACES))


def test_things_between_two_grounds_are_not_asked_for(asked: list[tuple[Scene, list[Riddle]]]) -> None:
    checked = 0
    for scene, found in asked:
        for riddle in (r for r in found if r.type == "ground"):
            name = next(place for clause, place in PLACES.items() if clause in riddle.text)
            band = ground_map(scene.ground, scene.side) == scene.ground.names.index(name) + 1
            shares = [band[scene.visible(i)].mean() for i in range(len(scene.things))]
            assert all(s <= 0.1 or s >= 0.9 for s in shares)
            checked += 1
    assert checked > 30


def test_all_are_explained_truly(asked: list[tuple[Scene, list[Riddle]]]) -> None:
    for scene, riddle in ((scene, r) for scene, found in asked for r in found):
        others = [t for i, t in enumerate(scene.things) if i != riddle.thing]
        meant = scene.things[riddle.thing]
        why = re.sub(r"I see [^.]+\. ", "", riddle.explanation)
        assert (why == riddle.explanation) == (riddle.type == "shape"), "what is compared is told"
        if riddle.type == "shape":
            reason, looks = re.fullmatch(r"(.+\.) It is the (.+)\.", why).groups()
            assert meant.shape in reason
            assert looks == f"{meant.size} {meant.colour} {meant.texture} {meant.shape}"
        elif match := re.fullmatch(r"All the others are (\w+)\.", why):
            plurals = {t.shape + ("es" if t.shape.endswith("s") else "s") for t in others}
            assert any({match[1]} == {getattr(t, a) for t in others} for a in LOOKS) or {match[1]} == plurals
        elif match := re.fullmatch(r"The (\w+)most shape, (\w\d), is (?:an? )?(\w+)\.", why):
            axis, sign = SIDES[match[1]]
            anchor = min(scene.things, key=lambda t: sign * t.centre[axis])
            assert match[2] == square(anchor) and match[3] in (anchor.colour, anchor.shape)
        else:
            assert riddle.type == "ground" and next(p for c, p in PLACES.items() if c in riddle.text) in why


def test_what_is_compared_is_listed_thing_by_thing(asked: list[tuple[Scene, list[Riddle]]]) -> None:
    lists: Counter[str] = Counter()
    for scene, riddle in ((scene, r) for scene, found in asked for r in found if r.type != "shape"):
        things = sorted(scene.things, key=lambda t: SQUARES.index(square(t)))
        told = [
            [item.split() for item in seen.split(", ")] for seen in re.findall(r"I see (.+?)\.", riddle.explanation)
        ]
        assert all([place for place, _ in seen] == [square(t) for t in things] for seen in told), "as one reads"
        values = [[value for _, value in seen] for seen in told]
        meant = things.index(scene.things[riddle.thing])
        if riddle.type == "odd":
            assert values == [[getattr(t, a) for t in things] for a in LOOKS[: len(values)]]
            differs = [len(set(seen)) == 2 and seen.count(seen[meant]) == 1 and len(seen) > 2 for seen in values]
            assert differs == [False] * (len(values) - 1) + [True], "until what is odd"
        elif riddle.type == "alike":
            attribute = re.search("colour|shape", riddle.text)[0]
            assert values == [[getattr(t, attribute) for t in things]]
        else:
            name = next(place for clause, place in PLACES.items() if clause in riddle.text)
            assert [i for i, value in enumerate(values[0]) if value == name] == [meant], "one thing alone is on it"
            assert len(values) == 1 and set(values[0]) <= set(scene.ground.names)
        lists[riddle.type] += 1
    assert min(lists[kind] for kind in TYPES if kind != "shape") > 30


def test_same_seed_same_riddles() -> None:
    assert [r for _, r in drawn(20)] == [r for _, r in drawn(20)]


def test_spans_name_everything_once() -> None:
    for i in range(100):
        scene = sample_scene(19, i, side=64, variant=("easy", "hard")[i % 2])
        text, spans = grounded(scene, np.random.default_rng(i))
        covered = sum(mask.astype(int) for span in spans for mask in span.masks)
        assert (covered == 1).all(), "every pixel belongs to exactly one mask of one span"
        assert [s.start for s in spans] == sorted(s.start for s in spans)
        assert all(a.end < b.start for a, b in pairwise(spans))
        for span in spans:
            words = text[span.start : span.end].split()
            if words == [text[span.start : span.end]]:
                assert (span.masks[0] == (scene.owner == scene.ground.names.index(words[0]) + 1)).all()
                continue
            count = 1 if words[0] in ("a", "an") else NUMBERS.index(words[0])
            meant = [k for k, t in enumerate(scene.things) if t.colour == words[1] and words[2].startswith(t.shape[:4])]
            assert len(span.masks) == count == len(meant)
            assert all((mask == scene.visible(k)).all() for mask, k in zip(span.masks, meant, strict=True))


def test_the_miniature_language_model_can_read_all_of_it(asked: list[tuple[Scene, list[Riddle]]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(find("examples/tiny_parts/phi", "train_stages/models", suffix=""))
    texts = [line for _, found in asked for r in found for line in (r.text, r.explanation) if line]
    texts += [grounded(scene, np.random.default_rng(0))[0] for scene, _ in asked]
    for text in set(texts):
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
        assert not [p for p in pieces if p == "<unk>" or p.startswith("<0x")], text
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
        assert len(pieces) <= 4 * len(text.split()), f"{text}: more letters than words"


def test_riddles_read_differently_to_the_miniature_language_model() -> None:
    """Their words are in no text it learnt from: their pieces must not all lie where training pushes unread ones."""
    phi = find("examples/tiny_parts/phi", "train_stages/models", suffix="")
    tokenizer = AutoTokenizer.from_pretrained(phi)
    table = load_file(phi / "model.safetensors")["model.embed_tokens.weight"].float()
    clauses = [*SHAPE_CLAUSES, *GROUND_CLAUSES]
    pieces = sorted({i for text in clauses for i in tokenizer(text, add_special_tokens=False).input_ids})
    units = torch.nn.functional.normalize(table[pieces], dim=1)
    alike = (units @ units.T).fill_diagonal_(0)
    assert len(pieces) > 20 and (alike > 0.95).float().mean() < 0.01, tokenizer.convert_ids_to_tokens(pieces)
