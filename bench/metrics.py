"""AP against pycocotools and PQ against a loop in panopticapi's way, on the same predictions; same values, time, ratio.

    python bench/metrics.py [--images N] [--pairs N]

Pictures of 480 x 640 with 133 classes (80 things). AP: 7 things and 100 detections a picture, as many as COCO counts,
for objects of 8 to 150 pixels in radius. The claim on AP is about the values alone; with their 95 % intervals by 1000
resamples, which pycocotools has not, it is a row of its own.

PQ: 16 segments a picture, most of them found. panopticapi takes predictions as colours, which are turned into ids
first; that PNG files of them are written and read is not counted. A row of its own spares the loop the colours and
gives it maps of ids, as ours has them. Annotations are maps of ids for both. As with AP, each goes through all pictures
by itself, as in a program of its own; in a last row they take turns picture by picture, which costs us more than the
loop, because we find the caches as its sorting leaves them.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from record import save
from scipy import ndimage

from xseg.metrics import truth
from xseg.metrics.ap import DETECTIONS, AveragePrecision, annotations
from xseg.metrics.bootstrap import RESAMPLES
from xseg.metrics.panoptic import FN, FP, IOU, TP, PanopticQuality
from xseg.types import Categories, Instance, Masks, Prediction, Sample, Segment

SIZE, CLASSES, THINGS = (480, 640), 133, 80
SEGMENTS, OBJECTS = 16, 7
CATEGORIES = Categories(
    tuple(f"class {k}" for k in range(CLASSES)), tuple(range(CLASSES)), tuple(k < THINGS for k in range(CLASSES))
)
VOID, OFFSET = 0, 256**3


def regions(rng: np.random.Generator, count: int) -> np.ndarray:
    """A (H, W) int32 map of ``count`` smooth regions, numbered from 1."""
    coarse = rng.normal(size=(count, 6, 8))
    zoom = (SIZE[0] / 6, SIZE[1] / 8)
    fields = np.stack([ndimage.zoom(field, zoom, order=1) for field in coarse])
    return (fields.argmax(0) + 1).astype(np.int32)


def panoptic_scene(rng: np.random.Generator, key: str) -> tuple[Sample, Prediction]:
    """Annotated and predicted maps that agree but for a shift, some wrong classes, a crowd and void."""
    ids = regions(rng, SEGMENTS)
    classes = rng.integers(0, CLASSES, SEGMENTS)
    annotated = np.where(ids == SEGMENTS, 0, ids * 1000)
    names = tuple(int(i) * 1000 for i in range(1, SEGMENTS))
    instances = tuple(Instance(k, int(classes[k]), is_crowd=k == 0, id=names[k]) for k in range(SEGMENTS - 1))
    sample = Sample(key, (), SIZE, Masks(SIZE, id_map=annotated, ids=names), instances, CATEGORIES, image_id=key)
    moved = np.roll(ids, tuple(rng.integers(-6, 7, 2)), (0, 1))
    guess = np.where(rng.random(SEGMENTS) < 0.8, classes, rng.integers(0, CLASSES, SEGMENTS))
    segments = tuple(Segment({"size": list(SIZE), "counts": b""}, int(c)) for c in guess)
    return sample, Prediction(key, segments, panoptic=moved)


def blob(rng: np.random.Generator) -> np.ndarray:
    """A (H, W) bool object with a wavy outline."""
    radius = float(np.exp(rng.uniform(np.log(8), np.log(150))))
    y, x = rng.uniform(0, SIZE[0]), rng.uniform(0, SIZE[1])
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    angle = np.arctan2(rows - y, columns - x)
    waves = sum(rng.uniform(-0.15, 0.15) * np.sin(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    return np.hypot(rows - y, columns - x) < radius * (1 + waves)


def instance_scene(rng: np.random.Generator, key: str) -> tuple[Sample, Prediction]:
    """Things under many detections: shifted copies of the things, most of them of the right class."""
    masks = [mask for mask in (blob(rng) for _ in range(OBJECTS)) if mask.any()]
    classes = rng.integers(0, THINGS, len(masks))
    instances = tuple(Instance(k, int(c), is_crowd=rng.random() < 0.05) for k, c in enumerate(classes))
    rles = tuple(truth.encode(mask) for mask in masks)
    sample = Sample(key, (), SIZE, Masks(SIZE, rles), instances, CATEGORIES, image_id=key)
    found = []
    for _ in range(DETECTIONS):
        k = int(rng.integers(len(masks)))
        moved = np.roll(masks[k], tuple(rng.integers(-12, 13, 2)), (0, 1))
        label = int(classes[k]) if rng.random() < 0.7 else int(rng.integers(THINGS))
        found.append(Segment(truth.encode(moved), label, float(rng.random())))
    return sample, Prediction(key, extra={"instances": tuple(found)})


Scenes = list[tuple[Sample, Prediction]]


def ap_reference(scenes: Scenes) -> tuple[float, float]:
    """AP and AP50 by pycocotools, from the same samples and predictions."""
    rows = [annotations(sample) for sample, _ in scenes]
    found = [detections(prediction) for _, prediction in scenes]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": k, "height": SIZE[0], "width": SIZE[1]} for k in range(len(rows))],
            "annotations": numbered(rows),
            "categories": [{"id": k, "name": CATEGORIES.names[k]} for k in range(THINGS)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(numbered(found)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0]), 100 * float(evaluation.stats[1])


def numbered(images: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = [(k, row) for k, image in enumerate(images) for row in image]
    return [{**row, "id": n + 1, "image_id": image} for n, (image, row) in enumerate(rows)]


def detections(prediction: Prediction) -> list[dict[str, Any]]:
    found: tuple[Segment, ...] = prediction.extra["instances"]
    return [{"category_id": s.category, "segmentation": dict(s.mask), "score": s.score} for s in found]


def ap_ours(scenes: Scenes, resamples: int) -> tuple[float, float]:
    """Ours, with intervals by that many resamples."""
    metric = AveragePrecision(resamples=resamples)
    for sample, prediction in scenes:
        metric.update(prediction, sample)
    ap, ap50 = (score.value for score in metric.compute())
    return ap, ap50


def pq_of_one(
    sample: Sample, annotated: np.ndarray, found: np.ndarray, segments: tuple[Segment, ...], sums: np.ndarray
) -> None:
    """Add one picture to (classes, 4) sums of IoU of matches, TP, FP and FN, pair by pair as panopticapi's rules go."""
    true = {i.id: i for i in sample.instances}
    guess = {k + 1: s for k, s in enumerate(segments)}
    found_area = dict(zip(*(v.tolist() for v in np.unique(found, return_counts=True)), strict=True))
    true_area = dict(zip(*(v.tolist() for v in np.unique(annotated, return_counts=True)), strict=True))
    pairs, counts = np.unique(annotated.astype(np.uint64) * OFFSET + found.astype(np.uint64), return_counts=True)
    inter = {(int(p) // OFFSET, int(p) % OFFSET): int(n) for p, n in zip(pairs, counts, strict=True)}
    matched_true, matched_found = set(), set()
    for (a, b), n in inter.items():
        if a not in true or b not in guess or true[a].is_crowd or true[a].category != guess[b].category:
            continue
        iou = n / (true_area[a] + found_area[b] - n - inter.get((VOID, b), 0))
        if iou > 0.5:
            sums[true[a].category, IOU] += iou
            sums[true[a].category, TP] += 1
            matched_true.add(a)
            matched_found.add(b)
    crowd: dict[int, int] = {}
    for a, instance in true.items():
        if a in matched_true or a not in true_area:
            continue
        if instance.is_crowd:
            crowd[instance.category] = a
            continue
        sums[instance.category, FN] += 1
    for b, segment in guess.items():
        if b in matched_found or b not in found_area:
            continue
        ignored = inter.get((VOID, b), 0)
        if segment.category in crowd:
            ignored += inter.get((crowd[segment.category], b), 0)
        if ignored / found_area[b] <= 0.5:
            sums[segment.category, FP] += 1


def qualities(sums: np.ndarray) -> tuple[float, float, float]:
    """PQ, SQ and RQ in percent from (classes, 4) sums, means over the classes that occur."""
    iou, tp, fp, fn = sums[sums[:, 1:].sum(axis=1) > 0].T
    whole = tp + fp / 2 + fn / 2
    sq = np.where(tp > 0, iou / np.maximum(tp, 1), 0)
    return 100 * float((iou / whole).mean()), 100 * float(sq.mean()), 100 * float((tp / whole).mean())


def colours_of(ids: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the panoptic PNG format."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)


def ids_of(colours: np.ndarray) -> np.ndarray:
    """(H, W) uint32 from the colours of a panoptic PNG."""
    wide = colours.astype(np.uint32)
    return wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2]  # type: ignore[no-any-return]


def as_made(sample: Sample, prediction: Prediction) -> tuple[Sample, Prediction]:
    """Copies of both maps: in an evaluation they have just been decoded and predicted, and lie in the cache."""
    assert sample.masks is not None and sample.masks.id_map is not None and prediction.panoptic is not None
    masks = dataclasses.replace(sample.masks, id_map=sample.masks.id_map.copy())
    found = dataclasses.replace(prediction, panoptic=prediction.panoptic.copy())
    return dataclasses.replace(sample, masks=masks), found


def compare_pq(
    scenes: Scenes, pairs: int, *, coloured: bool, intervals: bool = False, in_turn: bool = False
) -> dict[str, float]:
    """All pictures go to the loop, then all to us; or (``in_turn``) each picture to both before the next."""
    seconds: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        sums, metric, spent = np.zeros((CLASSES, 4)), PanopticQuality(), [0.0, 0.0]
        for turn in [[scene] for scene in scenes] if in_turn else [scenes]:
            spent[0] += sum(loop_seconds(scene, sums, coloured) for scene in turn)
            spent[1] += sum(our_seconds(scene, metric) for scene in turn)
        start = time.process_time()
        want = qualities(sums)
        middle = time.process_time()
        got = reported(metric) if intervals else qualities(np.sum(metric.counts, axis=0)[:, [IOU, TP, FP, FN]])
        seconds.append((spent[0] + middle - start, spent[1] + time.process_time() - middle))
    return summary(seconds[1:], want, got)


def loop_seconds(scene: tuple[Sample, Prediction], sums: np.ndarray, coloured: bool) -> float:
    sample, prediction = as_made(*scene)
    assert sample.masks is not None and sample.masks.id_map is not None and prediction.panoptic is not None
    given = colours_of(prediction.panoptic) if coloured else prediction.panoptic
    start = time.process_time()
    pq_of_one(sample, sample.masks.id_map, ids_of(given) if coloured else given, prediction.segments, sums)
    return time.process_time() - start


def our_seconds(scene: tuple[Sample, Prediction], metric: PanopticQuality) -> float:
    sample, prediction = as_made(*scene)
    start = time.process_time()
    metric.update(prediction, sample)
    return time.process_time() - start


def reported(metric: PanopticQuality) -> tuple[float, float, float]:
    """What an evaluation reports, with intervals by 1000 resamples."""
    rows = {score.metric: score.value for score in metric.compute()}
    return rows["PQ"], rows["SQ"], rows["RQ"]


def compare_ap(scenes: Scenes, resamples: int, pairs: int) -> dict[str, float]:
    """All pictures at once, in turn by pycocotools and by us, after one warm-up of each."""
    seconds: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        start = time.process_time()
        want = ap_reference(scenes)
        middle = time.process_time()
        got = ap_ours(scenes, resamples)
        seconds.append((middle - start, time.process_time() - middle))
    return summary(seconds[1:], want, got)


def summary(seconds: list[tuple[float, float]], want: tuple[float, ...], got: tuple[float, ...]) -> dict[str, float]:
    """Medians of pairs of (first, ours) and of their ratios; raises where the values differ."""
    off = max(abs(a - b) for a, b in zip(want, got, strict=True))
    if off > 1e-6:
        raise AssertionError(f"values differ: {want} and {got}")
    return {
        "first_ms": 1e3 * statistics.median(a for a, _ in seconds),
        "xseg_ms": 1e3 * statistics.median(b for _, b in seconds),
        "ratio": statistics.median(a / b for a, b in seconds),
        "value": want[0],
        "largest_difference": off,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    things = [instance_scene(rng, str(k)) for k in range(args.images)]
    maps = [panoptic_scene(rng, str(k)) for k in range(args.images)]
    table = {
        "AP, AP50": compare_ap(things, 0, args.pairs),
        "AP, AP50 with intervals": compare_ap(things, RESAMPLES, 1),
        "PQ, SQ, RQ": compare_pq(maps, args.pairs, coloured=True),
        "PQ, SQ, RQ with intervals": compare_pq(maps, args.pairs, coloured=True, intervals=True),
        "PQ, SQ, RQ from maps of ids": compare_pq(maps, args.pairs, coloured=False),
        "PQ, SQ, RQ from maps, in turn": compare_pq(maps, args.pairs, coloured=False, in_turn=True),
    }
    print(f"{'what':30s}{'first ms':>12s}{'xseg ms':>12s}{'ratio':>9s}{'value':>9s}{'off':>12s}")
    for name, row in table.items():
        first, xseg, ratio, value, off = row.values()
        print(f"{name:30s}{first:12.1f}{xseg:12.1f}{ratio:9.1f}{value:9.3f}{off:12.2g}")
    about = {
        "claim": "equal values; AP at least 10 times as fast as pycocotools, PQ at least 5 times as panopticapi's way",
        "images": args.images,
        "pairs": args.pairs,
        "method": "medians of alternating runs, processor time; other programs were running on the machine",
    }
    save("metrics", {**about, "rows": table}, ["hotcoco", "pycocotools", "numpy"], args.out)


if __name__ == "__main__":
    main()
