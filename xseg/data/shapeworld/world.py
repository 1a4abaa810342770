"""Scenes of ShapeWorld: coloured shapes, near before far, over two or three kinds of ground.

A scene is a pure function of (seed, index, size, variant, policy). Splits take disjoint index ranges, see ``SPLITS``.
Two shapes and two colour-shape pairs are held out: policy "seen" never shows them, "open" puts a held-out shape into
every scene, "pairs" a held-out pair.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from xseg.errors import UserError, did_you_mean

Policy = Literal["seen", "open", "pairs"]
Variant = Literal["easy", "hard"]

SEEN_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "bar")
HELD_OUT_SHAPES = ("heart", "arrow")
SHAPES = SEEN_SHAPES + HELD_OUT_SHAPES
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
HELD_OUT_PAIRS = (("purple", "triangle"), ("yellow", "ring"))
SIZES = ("large", "small")
TEXTURES = ("plain", "striped", "dotted")
GROUNDS = ("sky", "grass", "water", "sand", "stone")

SPLITS: dict[str, tuple[int, Policy]] = {
    "train": (0, "seen"),
    "val": (1 << 24, "seen"),
    "overfit": (2 << 24, "seen"),
    "val_open": (3 << 24, "open"),
    "val_pairs": (4 << 24, "pairs"),
    "parts": (5 << 24, "seen"),
    "clips": (6 << 24, "seen"),
}
"""Split -> (first scene index, policy). Image k of a split is scene ``first + k``, k < 2**24, so that two splits never
share a scene, whatever their length. "parts" is for pretraining the miniature encoders; no stage and no suite uses
it. "clips" are the first frames of clips."""
SPLIT_LENGTH = 1 << 24

MIN_VISIBLE = 0.5
"""Least visible part of a thing, what lies outside the picture counted as hidden."""
MIN_GROUND = 0.05
"""Least visible part of the picture that each kind of ground takes."""
MIN_GAP = 0.15
"""Least distance of two centres, as a part of the side."""


@dataclass(frozen=True)
class Thing:
    """One shape. Lengths are parts of the picture's side."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    """Centre of the whole shape, from the left edge; may lie near or beyond the border."""
    y: float
    """The same from the top edge."""
    radius: float
    angle: float
    """Rotation in radian, clockwise."""
    centre: tuple[float, float] = (0.0, 0.0)
    """(x, y) of the centre of gravity of the visible pixels; what the language speaks about."""


@dataclass(frozen=True)
class Ground:
    """How the kinds of ground share the picture: bands across ``direction`` with wavy borders."""

    names: tuple[str, ...]
    direction: float
    """Angle in radian of the axis along which the bands follow one another; pi / 2 = from top to bottom."""
    borders: tuple[float, ...]
    """Places of the borders on that axis, ascending, one fewer than names."""
    wave: tuple[float, float, float]
    """Amplitude, frequency and phase of the borders."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything there is to know about one picture."""

    side: int
    """Height and width in pixels."""
    ground: Ground
    things: tuple[Thing, ...]
    """By depth, far before near."""
    owner: np.ndarray
    """(side, side) uint8: who is seen. Ground i is i + 1, thing j is len(ground.names) + 1 + j."""
    policy: Policy
    paint_seed: int
    """Seed of the colour jitter and the ground's grain."""

    def visible(self, thing: int) -> np.ndarray:
        """Return the (side, side) bool mask of the visible pixels of things[thing]."""
        return self.owner == len(self.ground.names) + 1 + thing


@dataclass(frozen=True)
class _Ranges:
    """What a variant draws from; radii are parts of the side, counts inclusive."""

    things: tuple[int, int]
    shapes: tuple[int, int]
    colours: tuple[int, int]
    radius: dict[str, tuple[float, float]]


VARIANTS: dict[str, _Ranges] = {
    "easy": _Ranges((2, 6), (1, 3), (2, 3), {"small": (12 / 128, 15 / 128), "large": (21 / 128, 27 / 128)}),
    "hard": _Ranges((5, 10), (2, 5), (3, 5), {"small": (8 / 128, 10 / 128), "large": (14 / 128, 19 / 128)}),
}


def shapes_of(policy: Policy) -> tuple[str, ...]:
    """Return the shapes that scenes of this policy may hold."""
    return SHAPES if policy == "open" else SEEN_SHAPES


def allowed(colour: str, shape: str, policy: Policy) -> bool:
    """Whether scenes (and sentences) of this policy may hold a ``shape`` of this ``colour``."""
    return shape in shapes_of(policy) and (policy == "pairs" or (colour, shape) not in HELD_OUT_PAIRS)


def split_scene(seed: int, split: str, number: int, *, side: int = 128, variant: Variant = "easy") -> Scene:
    """Return image ``number`` of a split; UserError for an unknown split or a number beyond its range."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not one of ShapeWorld's{did_you_mean(split, SPLITS)}")
    if not 0 <= number < SPLIT_LENGTH:
        raise UserError(f"image {number} of split {split}: a split has {SPLIT_LENGTH} images, so that none overlap")
    first, policy = SPLITS[split]
    return sample_scene(seed, first + number, side=side, variant=variant, policy=policy)


def sample_scene(
    seed: int, index: int, *, side: int = 128, variant: Variant = "easy", policy: Policy = "seen"
) -> Scene:
    """Draw the scene of (seed, index), both non-negative; ``side`` in pixels, at least 32."""
    if side < 32:
        raise UserError(f"size {side}: shapes of ShapeWorld need at least 32 pixels a side")
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r} is not one of ShapeWorld's{did_you_mean(variant, VARIANTS)}")
    rng = np.random.default_rng([seed, index])
    while True:
        ground = _draw_ground(rng)
        base = ground_map(ground, side)
        things, owner = _place(_draw_things(rng, VARIANTS[variant], policy), base, rng)
        paint_seed = int(rng.integers(1 << 31))
        seen = np.bincount(owner.ravel(), minlength=len(ground.names) + 1)[1 : len(ground.names) + 1]
        if len(things) >= VARIANTS[variant].things[0] and seen.min() >= MIN_GROUND * side * side:
            return Scene(side, ground, _with_centres(things, owner, len(ground.names)), owner, policy, paint_seed)


def _draw_ground(rng: np.random.Generator) -> Ground:
    count = int(rng.integers(2, 4))
    names = [str(n) for n in rng.choice(GROUNDS, count, replace=False)]
    upright = rng.random() < 0.7
    if upright and "sky" in names:
        names.remove("sky")
        names.insert(0, "sky")
    direction = (np.pi / 2 if upright else 0.0) + rng.uniform(-0.35, 0.35)
    parts = rng.uniform(0.7, 1.3, count)
    borders = tuple(float(b) for b in np.cumsum(parts / parts.sum())[:-1])
    wave = (float(rng.uniform(0.0, 0.025)), float(rng.uniform(1.0, 3.0)), float(rng.uniform(0, 2 * np.pi)))
    return Ground(tuple(names), float(direction), borders, wave)


def ground_map(ground: Ground, side: int) -> np.ndarray:
    """Return (side, side) uint8: 1 + the number of the band at each pixel."""
    place = (np.arange(side) + 0.5) / side - 0.5
    x, y = place[None, :], place[:, None]
    cos, sin = np.cos(ground.direction), np.sin(ground.direction)
    amplitude, frequency, phase = ground.wave
    along = 0.5 + x * cos + y * sin + amplitude * np.sin(2 * np.pi * frequency * (y * cos - x * sin) + phase)
    return (1 + sum((along > b).astype(np.uint8) for b in ground.borders)).astype(np.uint8)


def _draw_things(rng: np.random.Generator, ranges: _Ranges, policy: Policy) -> list[Thing]:
    """Draw things without places; under "open" and "pairs" the last one, never hidden, is a held-out one."""
    shapes = [str(s) for s in rng.choice(SEEN_SHAPES, rng.integers(ranges.shapes[0], ranges.shapes[1] + 1), False)]
    colours = [str(c) for c in rng.choice(COLOURS, rng.integers(ranges.colours[0], ranges.colours[1] + 1), False)]
    count = int(rng.integers(ranges.things[0], ranges.things[1] + 1))
    must: tuple[str, str] | None = None
    if policy == "open":
        must = (str(rng.choice(colours)), str(rng.choice(HELD_OUT_SHAPES)))
    elif policy == "pairs":
        must = HELD_OUT_PAIRS[int(rng.integers(len(HELD_OUT_PAIRS)))]
    if must is not None:
        colours, shapes = [must[0], *colours[1:]], [must[1], *shapes[1:]]
    pairs = [(c, s) for c in colours for s in shapes if allowed(c, s, policy)]
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=count)]
    if must is not None:
        chosen[-1] = must
    return [_draw_thing(rng, ranges, colour, shape) for colour, shape in chosen]


def _draw_thing(rng: np.random.Generator, ranges: _Ranges, colour: str, shape: str) -> Thing:
    size = str(rng.choice(SIZES))
    texture = str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25)))
    angle = float(rng.uniform(-0.5, 0.5))
    return Thing(shape, colour, size, texture, 0.0, 0.0, float(rng.uniform(*ranges.radius[size])), angle)


def _place(things: list[Thing], base: np.ndarray, rng: np.random.Generator) -> tuple[list[Thing], np.ndarray]:
    """Put things one upon the other where all stay visible; the first of them that finds no place are left out."""
    side, grounds = len(base), int(base.max())
    owner, placed, areas = base.copy(), list[Thing](), list[int]()
    needed = things[-1]
    for thing in things:
        for _ in range(30):
            x, y = (float(v) for v in rng.uniform(0.06, 0.94, 2))
            if any(np.hypot(x - t.x, y - t.y) < MIN_GAP for t in placed):
                continue
            trial = replace(thing, x=x, y=y)
            window, distance = distance_field(trial, side)
            new = owner.copy()
            new[window][clip(distance, trial, side) < 0] = grounds + 1 + len(placed)
            trial_areas = [*areas, int((distance < 0).sum())]
            seen = np.bincount(new.ravel(), minlength=grounds + 1 + len(trial_areas))[grounds + 1 :]
            if (seen >= MIN_VISIBLE * np.asarray(trial_areas)).all():
                owner, areas = new, trial_areas
                placed.append(trial)
                break
        else:
            if thing is needed:
                return [], base
    return placed, owner


def _with_centres(things: list[Thing], owner: np.ndarray, grounds: int) -> tuple[Thing, ...]:
    side, out = len(owner), []
    for number, thing in enumerate(things):
        rows, columns = np.nonzero(owner == grounds + 1 + number)
        out.append(replace(thing, centre=((columns.mean() + 0.5) / side, (rows.mean() + 0.5) / side)))
    return tuple(out)


def _span(centre: float, radius: float, side: int) -> tuple[int, int]:
    """Pixels [first, last) that a shape can touch on one axis, not cut at the border."""
    reach = 1.25 * radius * side + 2
    return int(np.floor(centre * side - reach)), int(np.ceil(centre * side + reach))


def local_grid(thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (h, w) x and y in pixels in the thing's own rotated frame, over its whole uncut window."""
    (left, right), (top, bottom) = _span(thing.x, thing.radius, side), _span(thing.y, thing.radius, side)
    x = (np.arange(left, right) + 0.5 - thing.x * side)[None, :]
    y = (np.arange(top, bottom) + 0.5 - thing.y * side)[:, None]
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    return x * cos + y * sin, y * cos - x * sin


def distance_field(thing: Thing, side: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return the window inside the picture (rows, columns) and the signed distance in pixels over the uncut window.

    Negative inside. Near the outline it is a distance; far from it only a bound.
    """
    x, y = local_grid(thing, side)
    scale = thing.radius * side
    rows, columns = _span(thing.y, thing.radius, side), _span(thing.x, thing.radius, side)
    window = (slice(max(rows[0], 0), min(rows[1], side)), slice(max(columns[0], 0), min(columns[1], side)))
    return window, SIGNED_DISTANCE[thing.shape](x / scale, y / scale) * scale


def clip(field: np.ndarray, thing: Thing, side: int) -> np.ndarray:
    """Cut an array over the uncut window down to the window inside the picture."""
    (left, right), (top, bottom) = _span(thing.x, thing.radius, side), _span(thing.y, thing.radius, side)
    return field[
        max(-top, 0) : bottom - top - max(bottom - side, 0), max(-left, 0) : right - left - max(right - side, 0)
    ]


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _polygon(points: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signed distance of a simple polygon with (n, 2) corners."""
    starts, edges = points, np.roll(points, -1, axis=0) - points

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
        for (px, py), (ex, ey) in zip(starts, edges, strict=True):
            dx, dy = x - px, y - py
            part = np.clip((dx * ex + dy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (dx - ex * part) ** 2 + (dy - ey * part) ** 2)
            crosses = (dy >= 0) != (dy >= ey)
            inside ^= crosses & ((ex * dy - ey * dx) * np.sign(ey) > 0)
        return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)

    return distance


def _corners(radii: list[float]) -> np.ndarray:
    """Corners at equal angles, the first on top."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.asarray(radii)[:, None]


def _heart_outline() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -(y + 2)], axis=1) / 16


ARROW = [(0, -1.05), (0.85, -0.1), (0.34, -0.1), (0.34, 1), (-0.34, 1), (-0.34, -0.1), (-0.85, -0.1)]
SIGNED_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.92,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": _polygon(_corners([1.15, 1.15, 1.15])),
    "star": _polygon(_corners([1.15, 0.48] * 5)),
    "cross": lambda x, y: np.minimum(_box(x, y, 1.0, 0.3), _box(x, y, 0.3, 1.0)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.25,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1.0, 0.8 - np.hypot(x - 0.5, y)),
    "bar": lambda x, y: _box(x, y, 1.1, 0.36),
    "heart": _polygon(_heart_outline()),
    "arrow": _polygon(np.asarray(ARROW, float)),
}
"""Shape -> signed distance in its own frame, radius 1, y down."""
