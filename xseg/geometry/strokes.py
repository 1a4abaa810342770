"""Prompts that a hand draws rather than a data set: a free stroke through an object, and a polygon around it."""

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull, QhullError

from xseg.geometry.prompts import from_path, widen

STOPS = 4
"""Pixels that a stroke goes through."""
CORNERS = 8
"""Most corners of a polygon."""
SHAKE = 0.03
"""How far a corner is off, as a part of the object's size."""


def stroke(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the (H, W) bool mask of a line through random pixels of an object (H, W), as wide as a scribble."""
    rows, columns = np.nonzero(mask)
    picked = rng.choice(len(rows), min(STOPS, len(rows)), replace=False)
    # in the order of the object's long axis, so that the hand does not go back and forth
    picked = picked[np.argsort((columns if np.ptp(columns) > np.ptp(rows) else rows)[picked], kind="stable")]
    return widen("scribble", from_path(mask.shape, np.stack([columns[picked], rows[picked]], 1).tolist()))


def polygon(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the (H, W) bool mask of a filled polygon of at most ``CORNERS`` corners about an object (H, W)."""
    rows = np.flatnonzero(mask.any(1))
    within = mask[rows].astype(bool)
    # both ends of every row: no other pixel is a corner of the hull
    columns = np.stack([within.argmax(1), mask.shape[1] - 1 - within[:, ::-1].argmax(1)], 1)
    points = np.stack([columns.ravel(), rows.repeat(2)], 1)
    try:
        outline = points[ConvexHull(points).vertices]
    except (QhullError, ValueError):
        return mask.astype(bool)  # a line or a few pixels: there is nothing to go around
    kept = outline[np.linspace(0, len(outline), min(CORNERS, len(outline)), endpoint=False).astype(int)]
    shaken = kept + rng.normal(0, SHAKE * max(np.ptp(rows), np.ptp(columns)), kept.shape)
    return filled(mask.shape, shaken)


def filled(size: tuple[int, ...], corners: np.ndarray) -> np.ndarray:
    """Return the (H, W) bool mask of a polygon of (x, y) pixels, its border inside."""
    image = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in corners], fill=1, outline=1)
    return np.asarray(image)
