"""Visual prompts as masks: drawn at random from an object's mask, or made of a user's clicks, strokes and boxes.

The random ones follow X-SAM's VGD annotations (section 5.3 of the data description): every connected part of more than
``LEAST`` pixels gets a point, a scribble, a box and a rough mask; the parts of an object are united per kind.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

from xseg.types import Size

KINDS = ("point", "scribble", "box", "mask")
RADIUS = {"point": 10, "scribble": 5}
"""Radius in pixels to which the thin kinds are widened, on photographs."""
PHOTOGRAPH = 640
"""Long side in pixels of the photographs that prompts are drawn on (COCO's)."""
LEAST = 5
"""Parts of this many pixels or fewer get no prompt."""
TRIES = 1000
SIGMA = 2.0
"""Blur of the rough mask, in pixels."""


def draw(mask: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One prompt of each of ``KINDS`` for an object: (H, W) bool each; {} where no part has more than ``LEAST`` pixels.

    ``mask`` is (H, W) bool or uint8. Points and scribbles are thin: ``widen`` gives them their width.
    """
    out: dict[str, np.ndarray] = {}
    for part, box in _parts(mask):
        if not out:
            out = {kind: np.zeros(mask.shape, bool) for kind in KINDS}
        out["point"][_point(part, box, rng)] = True
        _stroke(out["scribble"], _scribble(box, rng))
        top, left, bottom, right = np.rint(_scaled(box, rng, 0.9, 1.1)).astype(int)
        out["box"][max(top, 0) : bottom, max(left, 0) : right] = True
        _add_rough(out["mask"], part)
    for prompt in out.values():
        # A scribble along the edge of the image may lie outside: better any pixel of the object than no prompt.
        if not prompt.any():
            prompt |= out["point"]
    return out


def widen(kind: str, prompt: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Give a thin prompt the width of its kind: every pixel becomes a disc of ``RADIUS`` x ``scale``; others stay."""
    radius = RADIUS.get(kind, 0) * scale
    if not radius or not prompt.any():
        return prompt.astype(bool)
    rows, columns = window(prompt, int(np.ceil(radius)))
    out = np.zeros(prompt.shape, bool)
    out[rows, columns] = ndimage.distance_transform_edt(~prompt[rows, columns].astype(bool)) <= radius
    return out


def from_points(size: Size, points: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the thin (H, W) bool mask of clicks at (x, y) pixels; points outside the image are left out."""
    out = np.zeros(size, bool)
    xy = np.floor(np.asarray(points, np.float64).reshape(-1, 2)).astype(int)
    inside = (xy >= 0).all(1) & (xy[:, 0] < size[1]) & (xy[:, 1] < size[0])
    out[xy[inside, 1], xy[inside, 0]] = True
    return out


def from_path(size: Size, points: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the thin (H, W) bool mask of a stroke through (x, y) pixels."""
    out = np.zeros(size, bool)
    _stroke(out, np.asarray(points, np.float64).reshape(-1, 2)[:, ::-1])
    return out


def from_box(size: Size, box: Sequence[float]) -> np.ndarray:
    """Return the filled (H, W) bool mask of (x1, y1, x2, y2) in pixels, the far edges outside."""
    out = np.zeros(size, bool)
    left, top, right, bottom = np.rint(np.asarray(box, np.float64)).astype(int)
    out[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return out


def window(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
    """Return the rows and columns that a (H, W) mask, which is not empty, lies in, with ``margin`` pixels around."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0)
    return slice(top, int(rows[-1]) + margin + 1), slice(left, int(columns[-1]) + margin + 1)


def _parts(mask: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(mask of one part, its (top, left, bottom, right)) of every part that is large enough."""
    labels, count = ndimage.label(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        if areas[number] > LEAST:
            yield labels == number, np.array([rows.start, columns.start, rows.stop, columns.stop], np.float64)


def _point(part: np.ndarray, box: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Return a (row, column) inside the part, around its centroid, within half the short side of its box."""
    rows, columns = np.nonzero(part)
    centre = np.array([rows.mean(), columns.mean()])
    reach = min(box[2] - box[0], box[3] - box[1]) / 2
    angle, radius = rng.uniform(0, 2 * np.pi, TRIES), rng.uniform(0, reach, TRIES)
    tries = np.rint(centre + radius[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)).astype(int)
    tries = np.clip(tries, 0, np.array(part.shape) - 1)
    hits = np.flatnonzero(part[tries[:, 0], tries[:, 1]])
    if len(hits):
        return int(tries[hits[0], 0]), int(tries[hits[0], 1])
    nearest = np.argmin((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2)  # a ring has nothing near its centroid
    return int(rows[nearest]), int(columns[nearest])


def _scribble(box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the (n, 2) rows and columns of a wave along a diagonal of a box of much the same size."""
    for _ in range(TRIES):
        near = _scaled(box, rng, 0.5, 1.2)
        if _box_iou(near, box) >= 0.5:
            break
    else:
        near = box
    top, left, bottom, right = near
    if rng.random() < 0.5:
        left, right = right, left
    t = np.linspace(0, 1, int(max(abs(bottom - top), abs(right - left))) + 2)
    wave = rng.uniform(10, 20) * np.sin(2 * np.pi * rng.uniform(0.2, 1) * t)
    return np.stack([top + (bottom - top) * t + wave, left + (right - left) * t], 1)


def _scaled(box: np.ndarray, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Return the box with height and width scaled on their own, the centre kept."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * rng.uniform(low, high, 2)
    return np.concatenate([centre - half, centre + half])


def _box_iou(a: np.ndarray, b: np.ndarray) -> float:
    both = float(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod())
    return both / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def _stroke(out: np.ndarray, path: np.ndarray) -> None:
    """Set the pixels under the straight lines between the (row, column) points of ``path``."""
    if len(path) > 1:
        starts, ends = _near(path[:-1], path[1:], out.shape)
        # np.linspace of every line, to the last bit, in one sum: a path's lines are many and short.
        counts = np.ceil(np.abs(ends - starts).max(1)).astype(int) + 1
        line, first = np.repeat(np.arange(len(counts)), counts), counts.cumsum() - counts
        run, last = ends - starts, np.maximum(counts - 1, 1)[:, None]
        number, step = (np.arange(len(line)) - first[line])[:, None], run / last
        # where a line stands still along an axis, linspace multiplies in another order
        even = (step != 0).all(1, keepdims=True)
        path = starts[line] + np.where(even[line], number * step[line], number / last[line] * run[line])
        path[(first + counts - 1)[counts > 1]] = ends[counts > 1]
    at = np.floor(path).astype(int)
    inside = (at >= 0).all(1) & (at < np.array(out.shape)).all(1)
    out[at[inside, 0], at[inside, 1]] = True


def _near(starts: np.ndarray, ends: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n, 2) ends of straight lines, cut where a line runs far outside the image.

    Each pixel of a line's length is a row in memory, seen or not. Cut lines are sampled a little differently, so
    nothing is cut within an image's side and the waves of two scribbles: what ``draw`` makes stays as it is.
    """
    margin = max(shape) + 40.5  # not whole: steps of one pixel from a whole number may round past a pixel
    low, high = np.full(2, -margin), np.array(shape) + margin
    far = ~((starts >= low) & (starts <= high) & (ends >= low) & (ends <= high)).all(1, keepdims=True)
    if not far.any():
        return starts, ends
    with np.errstate(all="ignore"):  # a line along an axis never crosses the other borders: infinite, which is right
        run = ends - starts
        crossings = np.stack([(low - starts) / run, (high - starts) / run])
        enter = np.fmax(np.fmin(*crossings).max(1, keepdims=True), 0)
        leave = np.fmin(np.fmax(*crossings).min(1, keepdims=True), 1)
        missed = enter > leave  # of such a line its start is left, moved to the border, which is outside the image
        first, last = starts + np.where(missed, 0, enter) * run, starts + np.where(missed, 0, leave) * run
    return np.where(far, np.clip(first, low, high), starts), np.where(far, np.clip(last, low, high), ends)


def _add_rough(out: np.ndarray, part: np.ndarray) -> None:
    """Add the blurred part where it exceeds its mean over the image."""
    rows, columns = window(part, int(4 * SIGMA) + 1)  # beyond four sigma the blur is zero
    blurred = ndimage.gaussian_filter(part[rows, columns].astype(np.float32), SIGMA)
    out[rows, columns] |= blurred > blurred.sum() / part.size
