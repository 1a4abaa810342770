"""Boards tell the truth about scenes."""

import numpy as np

from xseg.data.shapeworld.board import BARE, COVERED, MOST, NOWHERE, SIDE, SQUARES, board, square
from xseg.data.shapeworld.language import READ, descriptions, expressions
from xseg.data.shapeworld.questions import places
from xseg.data.shapeworld.world import SIZES, split_scene


def scenes():
    return [split_scene(0, "val", number, side=48) for number in range(60)]


def look(thing):
    return thing.colour, thing.texture, thing.shape


def test_a_board_names_every_thing_once_where_it_stands():
    for scene in scenes():
        told = board(scene)
        assert len(told) == 36
        assert max(map(len, told)) <= MOST
        assert tuple(words[-1] for words in told) == SQUARES
        assert {words[-1] for words in told if words[0] in SIZES} == {square(t) for t in scene.things}
        for thing in scene.things:
            if sum(square(t) == square(thing) for t in scene.things) == 1:
                assert told[SQUARES.index(square(thing))] == (thing.size, *look(thing), square(thing))


def test_a_square_without_a_centre_shows_what_most_of_it_belongs_to():
    for scene in scenes():
        step = scene.side // SIDE
        for place, words in enumerate(board(scene)):
            if words[0] in (COVERED, BARE):
                row, column = divmod(place, SIDE)
                cell = scene.owner[row * step : (row + 1) * step, column * step : (column + 1) * step]
                owner = np.bincount(cell.ravel()).argmax()
                looks = [*((name,) for name in scene.ground.names), *map(look, scene.things)]
                assert words[1:-1] == looks[owner - 1]
                assert (words[0] == COVERED) == (owner > len(scene.ground.names))


def test_places_are_the_squares_of_what_is_asked_for():
    seen = set()
    for number, scene in enumerate(scenes()):
        for expression, question in zip(
            expressions(scene, np.random.default_rng(number), 5),
            places(scene, np.random.default_rng(number), 5),
            strict=True,
        ):
            said = question.answer.removeprefix("here ").removesuffix(".")
            assert expression.text in question.text
            assert said == (square(scene.things[expression.things[0]]) if expression.things else NOWHERE)
            seen.add(said)
    assert NOWHERE in seen and len(seen) > 20


def test_descriptions_name_every_thing_in_the_order_they_promise():
    for number, scene in enumerate(scenes()):
        answers = dict(descriptions(scene, np.random.default_rng(number)))
        for question, axis in (("Name everything from left to right.", 0), ("Name everything from top to bottom.", 1)):
            said = [t.shape for t in sorted(scene.things, key=lambda t: t.centre[axis])]
            words = answers[question].replace(",", "").replace(".", "").split()
            assert [w for w in words if w in said] == said
        for thing in scene.things:
            assert f"{thing.colour} {thing.texture} {thing.shape} at {square(thing)}" in answers["Where is everything?"]
        told = {words[-1]: words[:-1] for words in board(scene)}
        read = [part.split() for part in answers["What is on some squares?"].removesuffix(".").split(", ")]
        assert len({name for name, *_ in read}) == READ
        assert all(told[name] == tuple(words) for name, *words in read)
