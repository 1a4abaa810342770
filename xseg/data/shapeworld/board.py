"""A scene as a board of 6 x 6 squares, in words: what a text-only model can know of a picture.

Squares are named as on a chess board: column a to f from the left, row 1 to 6 from the top. ``board`` tells a scene in
two words a square: what is on it, and whether a thing has its centre there. The miniature language model is trained on
such boards before it sees any picture; SigLIP's and SAM's rows of each square take the places of these words later.
"""

import numpy as np

from xseg.data.shapeworld.world import COLOURS, HELD_OUT_PAIRS, SHAPES, TEXTURES, Scene, Thing

SIDE = 6
SQUARES = tuple(f"{column}{row + 1}" for row in range(SIDE) for column in "abcdef")
LARGE_SQUARES = tuple(name.upper() for name in SQUARES)
"""The square of a large thing's centre, on a board; sentences write squares small."""
COVERED, BARE, NOWHERE = "covered", "bare", "nowhere"
"""A square that holds no centre belongs mostly to a thing, or to the ground; ``NOWHERE`` is the place of nothing."""
KINDS = {
    f"{texture if texture != 'plain' else ''}{colour}{shape}": (texture, colour, shape)
    for shape in SHAPES
    for colour in COLOURS
    for texture in TEXTURES
    if (colour, shape) not in HELD_OUT_PAIRS
}
"""One word for each look of a thing, with its texture, colour and shape; held-out pairs have none."""
WORDS = (*SQUARES, *LARGE_SQUARES, COVERED, BARE, NOWHERE, *KINDS)
"""The words of boards beside the names of the grounds."""


def square(thing: Thing) -> str:
    """Return the name of the square that holds the thing's visible centre of gravity."""
    column, row = (min(int(v * SIDE), SIDE - 1) for v in thing.centre)
    return SQUARES[row * SIDE + column]


def kind(thing: Thing) -> str:
    """Return the one word for a thing's texture, colour and shape."""
    return f"{thing.texture if thing.texture != 'plain' else ''}{thing.colour}{thing.shape}"


def board(scene: Scene) -> list[str]:
    """Return 72 words, two a square, row by row: what is on it, and its name where a thing has its centre there.

    A square shows the thing whose centre it holds (the nearer of two), else what most of it belongs to. The scene's
    side must be a multiple of 6 pixels.
    """
    step, grounds = scene.side // SIDE, len(scene.ground.names)
    cells = scene.owner.reshape(SIDE, step, SIDE, step).swapaxes(1, 2).reshape(SIDE * SIDE, -1)
    most = [int(np.bincount(cell).argmax()) for cell in cells]
    looks = ["", *scene.ground.names, *(kind(t) for t in scene.things)]
    what = [looks[owner] for owner in most]
    where = [COVERED if owner > grounds else BARE for owner in most]
    for thing in scene.things:
        name = square(thing)
        place = SQUARES.index(name)
        what[place] = kind(thing)
        where[place] = name.upper() if thing.size == "large" else name
    return [word for pair in zip(what, where, strict=True) for word in pair]
