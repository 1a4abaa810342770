"""A scene as a board of 6 x 6 squares, in words: what a text-only model can know of a picture.

Squares are named as on a chess board: column a to f from the left, row 1 to 6 from the top. ``board`` tells each square
in a few words, which the miniature language model reads at one place, as the sum of their embeddings: as one row of an
image encoder holds everything about its square. It is trained on such boards before it sees any picture; SigLIP's and
SAM's rows take the places of the squares later.
"""

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


def board(scene: Scene) -> list[tuple[str, ...]]:
    """Return the words of the 36 squares, row by row.

    A square tells the look of the thing whose centre it holds (the nearer of two), with its size and the name of the
    square; else of the thing that most of it belongs to, and that it is covered; else its ground, and that it is bare.
    The scene's side must be a multiple of 6 pixels.
    """
    step, grounds = scene.side // SIDE, len(scene.ground.names)
    cells = scene.owner.reshape(SIDE, step, SIDE, step).swapaxes(1, 2).reshape(SIDE * SIDE, -1)
    out: list[tuple[str, ...]] = []
    for most in (int(np.bincount(cell).argmax()) for cell in cells):
        bare = most <= grounds
        out.append(
            (scene.ground.names[most - 1], BARE) if bare else (*_look(scene.things[most - grounds - 1]), COVERED)
        )
    for thing in scene.things:
        name = square(thing)
        out[SQUARES.index(name)] = (*_look(thing), name, thing.size)
    return out


def _look(thing: Thing) -> tuple[str, str, str]:
    return thing.texture, thing.colour, thing.shape
