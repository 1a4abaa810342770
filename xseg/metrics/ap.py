"""Instance average precision: COCO segm, through hotcoco (same numbers as pycocotools)."""

from typing import Any, Self

import hotcoco
import numpy as np
from hotcoco import mask as coco_mask

from xseg.metrics import truth
from xseg.metrics.bootstrap import RESAMPLES
from xseg.types import Categories, Prediction, Sample, Score, Segment

DETECTIONS = 100
"""Surest detections of an image that count, as COCO has it."""


class AveragePrecision:
    """AP and AP50 in percent over thing categories, 100 detections per image, crowd regions ignored as COCO does.

    ``note`` is put behind the protocol: how the detections were asked for. ``resamples`` of the images give the
    intervals, 0 = none.
    """

    def __init__(self, note: str = "", resamples: int = RESAMPLES) -> None:
        self.note, self.resamples = note, resamples
        self.categories: Categories | None = None
        self.images: list[tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[int, int]]] = []
        """Per image: annotations, detections, (H, W)."""
        self.mapped = False
        """Whether annotations were segments of one map, which hide parts of each other."""

    def update(self, prediction: Prediction, sample: Sample) -> dict[str, float]:
        """Take the detections of one image: the part of its things that they find, as AP has no value for one image."""
        self.add(prediction, sample)
        true, found, _ = self.images[-1]
        return recall(true, found)

    def add(self, prediction: Prediction, sample: Sample) -> None:
        """Take the detections of one image without a score of its own, which costs more than taking them."""
        assert sample.categories is not None
        self.categories = sample.categories
        self.mapped |= sample.masks is not None and sample.masks.id_map is not None
        size = truth.size_of(sample)
        self.images.append((annotations(sample), [_detection(s) for s in candidates(prediction)], size))

    def __iadd__(self, other: Self) -> Self:
        self.categories = self.categories or other.categories
        self.images += other.images
        self.mapped |= other.mapped
        return self

    def compute(self) -> list[Score]:
        """AP and AP50, or nothing when no thing is annotated."""
        if self.categories is None or not any(not a["iscrowd"] for image in self.images for a in image[0]):
            return []
        things = [k for k, thing in enumerate(self.categories.is_thing) if thing]
        truth_set = hotcoco.COCO(
            {
                "images": [{"id": k + 1, "height": i[2][0], "width": i[2][1]} for k, i in enumerate(self.images)],
                "annotations": _numbered([image[0] for image in self.images]),
                "categories": [{"id": k, "name": self.categories.names[k]} for k in things],
            }
        )
        nothing = _evaluated(truth_set, [])
        found = _evaluated(truth_set, _numbered([image[1] for image in self.images]))
        # hotcoco resamples images when it compares two evaluations; against no detections (AP 0) the difference is AP
        result = hotcoco.compare(nothing, found, n_bootstrap=self.resamples, seed=0)
        out = []
        for metric, protocol in (("AP", "IoU 0.50:0.95"), ("AP50", "IoU 0.50")):
            ci = result["ci"][metric] if result["ci"] and len(self.images) > 1 else None
            interval = (100 * ci["lower"], 100 * ci["upper"]) if ci else None
            text = f"COCO segm {protocol}, {DETECTIONS} detections per image, things only"
            text += ", which are segments of one map and do not overlap" if self.mapped else ""
            text += f"; {self.note}" if self.note else ""
            out.append(Score(metric, 100 * result["metrics_b"][metric], len(self.images), text, interval))
        return out


def recall(true: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, float]:
    """Part of the annotated things that some detection of their category covers with IoU >= 0.5; no thing, no part."""
    things = [a for a in true if not a["iscrowd"]]
    hits = 0
    for thing in things:
        same = [d["segmentation"] for d in found if d["category_id"] == thing["category_id"]]
        hits += bool(same and np.max(coco_mask.iou(same, [thing["segmentation"]], [0])) >= 0.5)
    return {"recall50": 100 * hits / len(things)} if things else {}


def candidates(prediction: Prediction) -> tuple[Segment, ...]:
    """The instance candidates: ``extra["instances"]`` beside a panoptic map, else the segments."""
    found: tuple[Segment, ...] = prediction.extra.get("instances", prediction.segments)
    return found


def annotations(sample: Sample) -> list[dict[str, Any]]:
    """The things of a sample as COCO annotations without numbers."""
    assert sample.categories is not None
    out = []
    for instance in sample.instances:
        if not sample.categories.is_thing[instance.category]:
            continue
        assert sample.masks is not None
        rle = truth.rle(sample.masks, instance.mask)
        box = [float(v) for v in coco_mask.to_bbox(rle)]
        area, crowd = float(coco_mask.area(rle)), int(instance.is_crowd)
        common = {"category_id": instance.category, "segmentation": rle, "area": area, "bbox": box}
        out.append({**common, "iscrowd": crowd})
    return out


def _detection(segment: Segment) -> dict[str, Any]:
    return {"category_id": segment.category, "segmentation": dict(segment.mask), "score": float(segment.score)}


def _numbered(images: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = [(k + 1, row) for k, image in enumerate(images) for row in image]
    return [{**row, "id": n + 1, "image_id": image} for n, (image, row) in enumerate(rows)]


def _evaluated(truth_set: Any, detections: list[dict[str, Any]]) -> Any:
    evaluation = hotcoco.COCOeval(truth_set, truth_set.load_res(detections), "segm")
    # AP and AP50 look at all sizes and the surest 100 detections alone; the other eleven cells cost as much each, and
    # every resample pays for them again
    only = evaluation.params
    only.area_rng, only.area_rng_lbl, only.max_dets = [[0, 1e10]], ["all"], [DETECTIONS]
    evaluation.params = only
    evaluation.evaluate()
    return evaluation
