"""The annotated side of a sample, as metrics read it."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from hotcoco import mask as coco_mask

from xseg.types import Masks, Sample, Size


def size_of(sample: Sample) -> Size:
    """Return (H, W) of a sample's annotation."""
    return sample.size if sample.masks is None else sample.masks.size


def mask(masks: Masks, row: int) -> np.ndarray:
    """Return mask ``row`` as (H, W) bool."""
    if masks.id_map is None:
        return coco_mask.decode(dict(masks.rles[row])).astype(bool)
    return masks.id_map == masks.ids[row]


def rle(masks: Masks, row: int) -> dict[str, Any]:
    """Return mask ``row`` as a COCO RLE."""
    if masks.id_map is None:
        return dict(masks.rles[row])
    return encode(masks.id_map == masks.ids[row])


def encode(array: np.ndarray) -> dict[str, Any]:
    """Return the RLE of a (H, W) mask."""
    return dict(coco_mask.encode(np.asfortranarray(array, dtype=np.uint8)))


def decode(segment: Mapping[str, Any]) -> np.ndarray:
    """Return the (H, W) bool mask of an RLE."""
    return coco_mask.decode(dict(segment)).astype(bool)


def union(masks: Masks | None, rows: Iterable[int], size: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) bool union of some masks."""
    out = np.zeros(size, bool)
    for row in rows:
        assert masks is not None
        out |= mask(masks, row)
    return out


def segment_map(sample: Sample) -> np.ndarray:
    """Return the (H, W) int32 map of a sample's instances: 0 = void, else 1 + index into ``sample.instances``.

    Where masks overlap, later instances lie on top, and all lie on top of crowd regions.
    """
    masks = sample.masks
    if masks is None:
        return np.zeros(sample.size, np.int32)
    order = sorted(range(len(sample.instances)), key=lambda i: not sample.instances[i].is_crowd)
    if masks.id_map is None:
        out = np.zeros(masks.size, np.int32)
        for i in order:
            out[mask(masks, sample.instances[i].mask)] = i + 1
        return out
    starts, lengths = stretches(masks.id_map)
    numbers = numbered(sample, masks.id_map.ravel().take(starts)).astype(np.int32)
    return np.repeat(numbers, lengths).reshape(masks.size)


def against(sample: Sample, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hold a predicted (H, W) map against the annotation, by the stretches in which neither changes, (n,) each.

    Returns the instance of each stretch (0 = void, else 1 + index into ``sample.instances``), its predicted value, and
    its length in pixels. ValueError, naming the sample, for a map of another size.
    """
    id_map = None if sample.masks is None else sample.masks.id_map
    true = segment_map(sample) if id_map is None else id_map
    if found.shape != true.shape:
        raise ValueError(f"{sample.key}: the predicted map is {found.shape}, the annotation is {true.shape}")
    starts, lengths = stretches(true, found)
    values = true.ravel().take(starts)
    return values if id_map is None else numbered(sample, values), found.ravel().take(starts), lengths


def numbered(sample: Sample, ids: np.ndarray) -> np.ndarray:
    """Return (n,) int64 for (n,) ids of the sample's id map: 1 + index of the instance, 0 = none has this id."""
    assert sample.masks is not None
    own = [sample.masks.ids[i.mask] for i in sample.instances]
    side = 256
    # a few ids are told apart by their last bits, which makes looking them up one step instead of a search
    while len({i & (side - 1) for i in own}) < len(own):
        side *= 2
    table = np.zeros(side, np.int64)
    table[[i & (side - 1) for i in own]] = np.arange(1, len(own) + 1)
    at = table.take(ids & (side - 1))
    at *= np.array([-1, *own], ids.dtype).take(at) == ids
    return at


def stretches(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, lengths), (n,) int64 each, of the stretches in which all maps of one (H, W) keep their values.

    Places are those of the raveled maps. Label maps have few stretches for their pixels, so that what is looked up or
    counted per stretch costs a small part of what it would per pixel.
    """
    first, *others = (m.ravel() for m in maps)
    size = first.size
    begins = np.empty(-(-size // 8) * 8, bool)
    begins[:1], begins[size:] = True, False
    np.not_equal(first[1:], first[:-1], out=begins[1:size])
    for other in others:
        begins[1:size] |= other[1:] != other[:-1]
    # eight pixels are looked at as one word: most stretches are longer, so that most words are passed over at once
    words = begins.view(np.uint64)
    some = np.flatnonzero(words != 0)
    within = np.flatnonzero(words.take(some).view(bool))
    starts = (8 * some).take(within >> 3) + (within & 7)
    return starts, np.ediff1d(starts, to_end=size - starts[-1:])
