"""Visual prompts for the things of a scene, drawn as large as they are drawn for photographs.

The widths and wiggles of X-SAM's prompts (section 5.3 of the data description) are pixels of a photograph: a click is a
disc of radius 10, as large as a whole thing of a picture of 96 pixels. So a thing is enlarged until the picture would
have a photograph's side, the prompts are drawn there, and the drawing is reduced again.
"""

import numpy as np

from xseg.data.shapeworld.world import Scene
from xseg.geometry import prompts, strokes

MARGIN = 1 / 12
"""Room around a thing for what goes over its edge, as a part of the picture's side."""
LEAST_PART = 0.3
"""A pixel belongs to a reduced prompt from this part of it on: less than a half, so that thin lines do not break."""
KINDS = (*prompts.KINDS, "stroke", "polygon")
TRIES = 20


def point_at(scene: Scene, thing: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return one prompt of each of ``KINDS`` for a thing: (side, side) bool, with its full width.

    Every prompt lies on more pixels of the thing than of any other; where chance draws none in ``TRIES``, the thing's
    own pixels stand for it.
    """
    mask, rivals = scene.visible(thing), scene.owner > len(scene.ground.names)
    out: dict[str, np.ndarray] = {}
    for _ in range(TRIES):
        for kind, drawn in _draw(mask, rng).items():
            touched = np.bincount(scene.owner[drawn & rivals & ~mask], minlength=1)
            if kind not in out and (drawn & mask).sum() > touched.max():
                out[kind] = drawn
        if len(out) == len(KINDS):
            break
    return {kind: out.get(kind, mask) for kind in KINDS}


def _draw(mask: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw on the enlarged thing with its surroundings, and reduce."""
    side = mask.shape[0]
    factor, margin = max(1, round(prompts.PHOTOGRAPH / side)), int(np.ceil(MARGIN * side))
    around = prompts.window(mask, margin)
    large = mask[around].repeat(factor, 0).repeat(factor, 1)
    drawn = {kind: prompts.widen(kind, prompt) for kind, prompt in prompts.draw(large, rng).items()}
    drawn |= {"stroke": strokes.stroke(large, rng), "polygon": strokes.polygon(large, rng)}
    out = {}
    for kind, prompt in drawn.items():
        out[kind] = np.zeros(mask.shape, bool)
        cells = prompt.reshape(-1, factor, prompt.shape[1] // factor, factor)
        out[kind][around] = cells.sum(1, dtype=np.uint16).sum(2) / factor**2 >= LEAST_PART
    return out
