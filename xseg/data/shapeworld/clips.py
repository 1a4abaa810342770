"""Clips of ShapeWorld: things that move, turn back at the border and pass behind one another, stored as DAVIS does.

``write_clips`` makes a folder::

    frames/00000/00000.jpg      a clip's pictures
    masks/00000/00000.png       palette PNGs of the same names: 0 = ground, 1 + k = the k-th thing from far to near
    shapeworld.json             what the folder was made from
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from xseg.data.parallel import ordered
from xseg.data.shapeworld.draw import PAINT, draw
from xseg.data.shapeworld.world import (
    SPLITS,
    Scene,
    Thing,
    Variant,
    clip,
    distance_field,
    ground_map,
    split_scene,
)
from xseg.data.shapeworld.write import Progress, whole_folder
from xseg.errors import UserError

SPLIT = "clips"
FRAMES = 12
STEP = (0.015, 0.045)
"""Least and most way of a thing from frame to frame, as a part of the side."""
BORDER = (0.08, 0.92)
"""A centre that leaves this part of the picture turns back."""
SPIN = 0.08
"""Most rotation from frame to frame in radian."""
HIDDEN, SEEN = 0.6, 0.9
"""In every clip some thing is seen to at least ``SEEN`` in one frame and to at most ``HIDDEN`` in another."""
TRIES = 20
"""Ways of moving that are tried before the things are drawn anew: a small thing cannot hide a large one behind it."""
MOST_CLIPS = 1 << 20
QUALITY = 95


def film(seed: int, number: int, *, side: int = 128, variant: Variant = "easy") -> list[Scene]:
    """Return the ``FRAMES`` frames of clip ``number``: things, depths and ground stay, places and angles change.

    ``Thing.centre`` is not kept up to date: a hidden thing has none.
    """
    attempt = 0
    while True:
        start = split_scene(seed, SPLIT, number + attempt * MOST_CLIPS, side=side, variant=variant)
        rng = np.random.default_rng([seed, SPLITS[SPLIT][0] + number, 1, attempt])
        for _ in range(TRIES):
            shots = _moved(start, rng)
            if _hides_something(shots):
                return shots
        attempt += 1


def _moved(start: Scene, rng: np.random.Generator) -> list[Scene]:
    base = ground_map(start.ground, start.side)
    things = len(start.things)
    angle, length = rng.uniform(0, 2 * np.pi, things), rng.uniform(*STEP, things)
    spin = rng.uniform(-SPIN, SPIN, things)
    out = []
    for frame in range(FRAMES):
        placed = tuple(
            replace(
                thing,
                x=_bounced(thing.x + frame * length[k] * np.cos(angle[k])),
                y=_bounced(thing.y + frame * length[k] * np.sin(angle[k])),
                angle=thing.angle + frame * float(spin[k]),
            )
            for k, thing in enumerate(start.things)
        )
        out.append(replace(start, things=placed, owner=_owner(placed, base)))
    return out


def _bounced(place: float) -> float:
    """Fold a straight way back into ``BORDER``."""
    low, high = BORDER
    way = (place - low) % (2 * (high - low))
    return float(low + min(way, 2 * (high - low) - way))


def _owner(things: tuple[Thing, ...], base: np.ndarray) -> np.ndarray:
    """Who is seen at each pixel when the things lie one upon the other; nobody must stay visible."""
    owner, side, grounds = base.copy(), len(base), int(base.max())
    for number, thing in enumerate(things):
        window, distance = distance_field(thing, side)
        owner[window][clip(distance, thing, side) < 0] = grounds + 1 + number
    return owner


def _hides_something(shots: list[Scene]) -> bool:
    seen = np.array([[shot.visible(k).sum() / _whole(shot, k) for k in range(len(shot.things))] for shot in shots])
    return bool(((seen.max(axis=0) >= SEEN) & (seen.min(axis=0) <= HIDDEN)).any())


def _whole(shot: Scene, thing: int) -> int:
    """Pixels inside the picture that a thing would have if nothing lay on it."""
    distance = distance_field(shot.things[thing], shot.side)[1]
    return int((clip(distance, shot.things[thing], shot.side) < 0).sum())


def write_clips(
    out: Path,
    clips: int,
    seed: int,
    *,
    size: int = 128,
    variant: Variant = "easy",
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write ``clips`` clips into the folder ``out``, which appears whole or not at all; the same arguments give the
    same bytes, however many processes work. Raises UserError where ``out`` holds anything else, and for a number of
    clips or a seed out of range."""
    if not 0 < clips <= MOST_CLIPS or seed < 0:
        raise UserError(f"{clips} clips with seed {seed}: 1 to {MOST_CLIPS} clips, and a seed of 0 or more")
    marker = {"format": 1, "split": SPLIT, "clips": clips, "seed": seed, "size": size, "variant": variant}

    def fill(folder: Path) -> None:
        for done, _ in enumerate(ordered(_Job(folder, seed, size, variant), clips, workers), start=1):
            if progress is not None:
                progress(done, clips)

    whole_folder(out, marker, fill)


@dataclass(frozen=True)
class _Job:
    """Writes the clip of a number."""

    folder: Path
    seed: int
    size: int
    variant: Variant

    def __call__(self, number: int) -> None:
        for kind in ("frames", "masks"):
            (self.folder / kind / f"{number:05d}").mkdir(parents=True)
        for at, shot in enumerate(film(self.seed, number, side=self.size, variant=self.variant)):
            name = f"{number:05d}/{at:05d}"
            Image.fromarray(draw(shot)).save(self.folder / f"frames/{name}.jpg", quality=QUALITY)
            grounds = len(shot.ground.names)
            numbers = Image.fromarray(np.where(shot.owner > grounds, shot.owner - grounds, 0).astype(np.uint8), "P")
            numbers.putpalette([0, 0, 0, *(value for colour in PAINT.values() for value in colour)])
            numbers.save(self.folder / f"masks/{name}.png")
