"""Binary masks: COCO RLE, polygons, panoptic id maps, and their place on the canvas of the mask view.

An ``Rle`` is a compressed COCO run-length mask ``{"size": [H, W], "counts": bytes}``. All pixel work on it is hotcoco's
(same bytes as pycocotools, several times faster).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from hotcoco import mask as coco_mask
from PIL import Image

from xseg.errors import UserError
from xseg.types import Masks, Size, ViewGeometry

Rle: TypeAlias = Mapping[str, Any]


def rle_from_segmentation(segmentation: Any, size: Size, where: str) -> dict[str, Any]:
    """Turn any COCO segmentation into a compressed RLE of ``size`` = (H, W) pixels.

    ``segmentation`` is a list of polygons ``[x1, y1, x2, y2, …]``, an RLE with a list of counts, or a compressed RLE.
    Polygons of fewer than three points enclose nothing and are skipped. Raises UserError, naming ``where``, for an
    RLE of another size, counts that do not fill the image, malformed polygons, and a ``size`` that no image has.
    """
    if min(size) < 1:
        raise UserError(f"{where}: an image of {list(size)} (height, width): both are 1 or more; correct its record")
    if isinstance(segmentation, Mapping):
        return _rle_from_mapping(segmentation, size, where)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str | bytes):
        raise UserError(
            f"{where}: segmentation {segmentation!r} is neither a list of polygons nor an RLE with size and counts; "
            f"write one of the COCO forms"
        )
    polygons = [_polygon(p, where) for p in segmentation]
    polygons = [p for p in polygons if len(p) >= 6]
    if not polygons:
        return encode(np.zeros(size, np.uint8))
    parts = coco_mask.frPyObjects(polygons, *size)
    return dict(parts[0] if len(parts) == 1 else coco_mask.merge(parts))


def _polygon(points: Any, where: str) -> list[float]:
    try:
        values = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.full(1, np.nan)
    if values.ndim != 1 or len(values) % 2 or not np.isfinite(values).all():
        raise UserError(
            f"{where}: polygon {str(points)[:80]} must be a flat list [x1, y1, x2, y2, …] of an even number of finite "
            f"numbers; repair that annotation"
        )
    return values.tolist()  # type: ignore[no-any-return]


def _rle_from_mapping(rle: Rle, size: Size, where: str) -> dict[str, Any]:
    stated = rle.get("size")
    if not isinstance(stated, Sequence) or tuple(stated) != tuple(size) or "counts" not in rle:
        raise UserError(
            f"{where}: mask of size {stated} (height, width) on an image of {list(size)}: a mask needs "
            f"'counts' and exactly its image's size; repair the mask or the image's height and width"
        )
    counts = rle["counts"]
    compressed = isinstance(counts, str | bytes)
    runs = _runs(counts) if compressed else _listed(counts, where)
    if (runs < 0).any() or int(runs.sum()) != size[0] * size[1]:
        raise UserError(
            f"{where}: RLE counts add up to {int(runs.sum())}, not to {size[0]} x {size[1]} = {size[0] * size[1]} "
            f"pixels: the mask is damaged or belongs to another image"
        )
    if not compressed:
        return dict(coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size))
    return {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else bytes(counts)}


def _listed(counts: Any, where: str) -> np.ndarray:
    """Run lengths that are written as a list; UserError for anything but a flat list of whole numbers."""
    try:
        runs = np.asarray(counts)
    except ValueError:  # lists of different lengths
        runs = np.zeros(())
    if runs.ndim != 1 or (runs.dtype.kind not in "iu" and len(runs)):
        raise UserError(
            f"{where}: RLE counts {str(counts)[:80]} are neither a compressed text nor a flat list of whole numbers; "
            "repair that mask"
        )
    return runs.astype(np.int64)


def _runs(counts: str | bytes) -> np.ndarray:
    """Run lengths of a compressed counts string: 5 bits a character, deltas from the fourth run on; [-1] = damaged."""
    chars = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((chars & 0x20) == 0)
    if not len(ends) or ends[-1] != len(chars) - 1 or chars.min() < 0 or chars.max() > 63:
        return np.full(1, -1)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shift = np.minimum(5 * (np.arange(len(chars)) - np.repeat(starts, ends - starts + 1)), 55)
    values = np.add.reduceat((chars & 0x1F) << shift, starts)
    values -= ((chars[ends] >> 4) & 1) << (shift[ends] + 5)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


def encode(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) uint8 or bool -> RLE."""
    return dict(coco_mask.encode(np.asfortranarray(mask)))


def encode_many(masks: np.ndarray) -> list[dict[str, Any]]:
    """(n, H, W) uint8 or bool -> n RLEs."""
    return [encode(mask) for mask in masks]


def decode(rle: Rle) -> np.ndarray:
    """RLE -> (H, W) uint8 of 0 and 1, column-major in memory."""
    return np.asarray(coco_mask.decode(dict(rle)))


def area(rle: Rle) -> int:
    """Number of pixels."""
    return int(coco_mask.area(dict(rle)))


def union(rles: Sequence[Rle]) -> dict[str, Any]:
    """One RLE that covers what any of ``rles`` covers; at least one is needed to know the size."""
    if not rles:
        raise ValueError("the union of no masks has no size")
    return dict(coco_mask.merge([dict(r) for r in rles]))


def iou(a: Rle, b: Rle) -> float:
    """Intersection over union in 0..1; two empty masks agree: 1."""
    both = area(union([a, b]))
    return (area(a) + area(b) - both) / both if both else 1.0


def to_json(rle: Rle) -> dict[str, Any]:
    """RLE as JSON can hold it: counts as text."""
    counts = rle["counts"]
    return {"size": [int(v) for v in rle["size"]], "counts": counts if isinstance(counts, str) else counts.decode()}


def from_json(rle: Rle) -> dict[str, Any]:
    """Inverse of ``to_json``."""
    counts = rle["counts"]
    return {"size": [int(v) for v in rle["size"]], "counts": counts.encode() if isinstance(counts, str) else counts}


def read_id_map(path: Path) -> np.ndarray:
    """Read a panoptic PNG, id = R + 256 G + 65536 B, as (H, W) int32; UserError when missing or not a picture."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise UserError(
                    f"{path}: a panoptic PNG is an RGB picture with id = R + 256 G + 65536 B, this one has mode "
                    f"{image.mode}; convert it"
                )
            rgba = np.asarray(image.convert("RGBA"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such panoptic PNG; check the recipe's folder and the JSON") from error
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: the panoptic PNG cannot be read ({error}); fetch it again") from error
    # One 32-bit view instead of three channel sums: the little-endian bytes are R, G, B, A.
    return (rgba.view("<u4")[..., 0] & 0xFFFFFF).astype(np.int32)


def write_id_map(path: Path, id_map: np.ndarray) -> None:
    """Write (H, W) ids in 0..2^24-1 as a panoptic PNG."""
    ids = np.ascontiguousarray(id_map, "<u4")
    if int(ids.max(initial=0)) >= 1 << 24:
        raise ValueError(f"segment id {int(ids.max())} does not fit into the 24 bits of a panoptic PNG")
    Image.fromarray(np.ascontiguousarray(ids.view(np.uint8).reshape(*ids.shape, 4)[..., :3])).save(path)


def dense(masks: Masks) -> np.ndarray:
    """All masks as (n, H, W) uint8 in original pixels."""
    out = np.zeros((len(masks), *masks.size), np.uint8)
    for row in range(len(masks)):
        out[row] = _original(masks, row)
    return out


def row_rle(masks: Masks, row: int) -> dict[str, Any]:
    """One mask of the set as RLE."""
    return dict(masks.rles[row]) if masks.id_map is None else encode(_original(masks, row))


def _original(masks: Masks, row: int) -> np.ndarray:
    if masks.id_map is None:
        return decode(masks.rles[row])
    return (masks.id_map == masks.ids[row]).view(np.uint8)


def on_canvas(masks: Masks, rows: Sequence[int], g: ViewGeometry) -> np.ndarray:
    """Place the chosen masks on the canvas of the mask view: (n, S, S) uint8, 0 outside the image.

    Nearest resize to ``g.scaled``, window at ``g.offset``; bit-equal to the resize SamImageProcessor gives
    segmentation maps (X-SAM section 3.2: masks follow the view). An id map is resized once for all its masks.
    """
    out = np.zeros((len(rows), g.canvas, g.canvas), np.uint8)
    if not out.size:
        return out
    ys, xs = (
        nearest_index(full, scaled)[start : start + g.canvas]
        for full, scaled, start in zip(masks.size, g.scaled, g.offset, strict=True)
    )
    region = out[:, : len(ys), : len(xs)]
    if masks.id_map is not None:
        placed = masks.id_map.take(xs, axis=1).take(ys, axis=0)
        for target, row in zip(region, rows, strict=True):
            np.equal(placed, masks.ids[row], out=target.view(bool))
        return out
    # Eight masks share one resize, a bit each. decode() is column-major, so the transposes are the fast direction.
    for start in range(0, len(rows), 8):
        bits = np.zeros(masks.size[::-1], np.uint8)
        for row in reversed(rows[start : start + 8]):
            bits += bits  # doubling is the fast way to shift bytes
            bits |= decode(masks.rles[row]).T
        placed = np.ascontiguousarray(bits.take(xs, axis=0).T).take(ys, axis=0)
        for bit, target in enumerate(region[start : start + 8]):
            np.not_equal(placed & (1 << bit), 0, out=target.view(bool))
    return out


@lru_cache(maxsize=1024)
def nearest_index(full: int, scaled: int) -> np.ndarray:
    """The source pixel of each target pixel in Pillow's nearest resize of a line of ``full`` to ``scaled`` pixels.

    Asked of Pillow itself, because its running sum of steps rounds differently from (i + 0.5) * full / scaled.
    """
    line = Image.fromarray(np.arange(full, dtype=np.int32)[None])
    index = np.asarray(line.resize((scaled, 1), Image.Resampling.NEAREST))[0].astype(np.intp)
    index.flags.writeable = False
    return index
