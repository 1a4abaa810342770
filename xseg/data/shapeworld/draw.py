"""The pixels of a scene: anti-aliased shapes over grounds with grain. A pixel shows what ``Scene.owner`` says."""

import numpy as np
from PIL import Image

from xseg.data.shapeworld.world import Scene, Thing, clip, distance_field, ground_map, local_grid

PAINT = {
    "red": (222, 38, 38),
    "green": (24, 150, 52),
    "blue": (38, 72, 226),
    "yellow": (250, 226, 40),
    "purple": (150, 46, 178),
    "orange": (250, 136, 20),
    "white": (250, 250, 250),
    "black": (26, 26, 26),
}
DARK = {"blue", "black", "purple", "red", "green"}
"""Colours whose stripes and dots are lighter than the colour; the others have darker ones."""
GROUND_PAINT = {
    "sky": ((176, 208, 236), (226, 236, 244)),
    "grass": ((112, 148, 84), (146, 178, 104)),
    "water": ((74, 126, 158), (112, 160, 186)),
    "sand": ((206, 184, 142), (222, 204, 168)),
    "stone": ((150, 148, 148), (108, 106, 108)),
}
"""Ground -> its two muted colours."""


def draw(scene: Scene) -> np.ndarray:
    """Return the (side, side, 3) uint8 RGB picture.

    A thing's colour covers a pixel by the part that lies inside its outline; ``Scene.owner`` has it where that is
    more than a half.
    """
    rng = np.random.default_rng(scene.paint_seed)
    picture = _ground(scene, rng)
    for thing in scene.things:
        window, distance = distance_field(thing, scene.side)
        cover = clip(np.clip(0.5 - distance, 0, 1), thing, scene.side)[..., None]
        colour = clip(_surface(thing, scene.side, distance, rng), thing, scene.side)
        picture[window] += cover * (colour - picture[window])
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _surface(thing: Thing, side: int, distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (h, w, 3) float colours over the thing's uncut window: paint, pattern and a thin rim."""
    first = np.clip(np.asarray(PAINT[thing.colour]) + rng.uniform(-8, 8, 3), 0, 255)
    rim = np.full(3, 170.0) if thing.colour == "black" else first * 0.35
    pattern = _pattern(thing, side)[..., None]
    other = first + 0.6 * (255 - first) if thing.colour in DARK else first * 0.55
    edge = np.clip(distance + 1.6, 0, 1)[..., None]
    colour = first + pattern * (other - first)
    return np.asarray(colour + edge * (rim - colour))


def _pattern(thing: Thing, side: int) -> np.ndarray:
    """Return (h, w) or (1, 1) values in [0, 1]: where the second colour of a striped or dotted thing shows."""
    if thing.texture == "plain":
        return np.zeros((1, 1))
    x, y = local_grid(thing, side)
    wave = 2 * np.pi / (0.058 * side)
    if thing.texture == "striped":
        return np.clip(0.5 + 1.5 * np.sin(wave * (x + y) * np.sqrt(0.5)), 0, 1)
    return np.clip(1.2 * (np.cos(wave * 0.9 * x) + np.cos(wave * 0.9 * y)) - 0.6, 0, 1)


def _ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return (side, side, 3) float32: each band in its own paint and grain."""
    bands = ground_map(scene.ground, scene.side)
    picture = np.empty((scene.side, scene.side, 3), np.float32)
    for number, name in enumerate(scene.ground.names):
        first, second = (np.asarray(c, np.float32) for c in GROUND_PAINT[name])
        amount = _grain(name, scene.side, rng)[..., None]
        colour = first + rng.uniform(-6, 6, 3).astype(np.float32) + amount * (second - first)
        picture = np.where((bands == number + 1)[..., None], colour, picture)
    return picture


def _grain(name: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return (side, side) float32 in [0, 1]: how much of the ground's second colour there is."""
    place = np.arange(side, dtype=np.float32) / side
    x, y = place[None, :], place[:, None]
    if name == "sky":
        return _noise(side, (5, 3), rng)
    if name == "grass":
        return _noise(side, (side // 2, side // 6), rng)
    if name == "sand":
        return _noise(side, (side // 3, side // 3), rng)
    phase = float(rng.uniform(0, 2 * np.pi))
    if name == "water":
        waves = np.sin(2 * np.pi * (16 * y + 0.35 * np.sin(2 * np.pi * 3 * x + phase)) + phase)
        return np.asarray(0.5 + 0.5 * waves, np.float32)
    row = np.floor(y * 10 + phase)
    joint_y, joint_x = (y * 10 + phase) % 1, (x * 6 + 0.5 * (row % 2) + phase) % 1
    return np.asarray((joint_y < 0.16) | (joint_x < 0.1), np.float32)


def _noise(side: int, cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in [0, 1] with ``cells`` (across, down) random values."""
    coarse = (rng.random((max(cells[1], 2), max(cells[0], 2))) * 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(smooth, np.float32) / 255
