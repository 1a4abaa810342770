"""A scene as a board of 6 x 6 squares, in words: what a text-only model can know of a picture.

Squares are named as on a chess board: column a to f from the left, row 1 to 6 from the top. ``board`` tells each square
in a few words, which the miniature language model reads at one place, as the sum of their embeddings: as one row of an
image encoder holds everything about its square. It is trained on such boards before it sees any picture; SigLIP's and
SAM's rows take the places of the squares later.
"""

from collections.abc import Sequence

import numpy as np

from xseg.data.shapeworld.world import Scene, Thing

SIDE = 6
SQUARES = tuple(f"{column}{row + 1}" for row in range(SIDE) for column in "abcdef")
COVERED, BARE, NOWHERE = "covered", "bare", "nowhere"
"""A square that holds no centre belongs mostly to a thing, or to the ground; ``NOWHERE`` is the place of nothing."""
MOST = 5
"""Most words of a square."""


def square(thing: Thing) -> str:
    """Return the name of the square that holds the thing's visible centre of gravity."""
    column, row = (min(int(v * SIDE), SIDE - 1) for v in thing.centre)
    return SQUARES[row * SIDE + column]


def place_of(scene: Scene, things: Sequence[int]) -> str:
    """Return the square of the first of these things, or that there is none."""
    return square(scene.things[things[0]]) if things else NOWHERE


def board(scene: Scene) -> list[tuple[str, ...]]:
    """Return the words of the 36 squares, row by row.

    A square tells the look of the thing whose centre it holds (the nearer of two), with its size; else of the thing
    that most of it belongs to, and that it is covered; else its ground, and that it is bare. Its name comes last.
    """
    edges, grounds = np.arange(SIDE + 1) * scene.side // SIDE, len(scene.ground.names)
    out: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(SQUARES):
        row, column = divmod(index, SIDE)
        cell = scene.owner[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        most = int(np.bincount(cell.ravel()).argmax()) - 1
        bare = most < grounds
        out[name] = (BARE, scene.ground.names[most]) if bare else (COVERED, *_look(scene.things[most - grounds]))
    for thing in scene.things:
        out[square(thing)] = (thing.size, *_look(thing))
    return [(*words, name) for name, words in out.items()]


def _look(thing: Thing) -> tuple[str, str, str]:
    return thing.colour, thing.texture, thing.shape
