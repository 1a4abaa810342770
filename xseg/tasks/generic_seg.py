"""Generic segmentation: all categories in one question, one query, many masks (X-SAM sections 3.1 and 3.4)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from xseg import postprocess
from xseg.errors import UserError
from xseg.geometry.masks import encode
from xseg.metrics import Metric, truth
from xseg.metrics.ap import AveragePrecision
from xseg.metrics.oracle import OracleGap
from xseg.metrics.panoptic import PanopticQuality
from xseg.metrics.semantic import MeanIoU
from xseg.tasks import base, phrasing
from xseg.tokens import IMAGE
from xseg.types import (
    Categories,
    Formatted,
    Instance,
    Masks,
    ModelOutput,
    Prediction,
    Query,
    Sample,
    Segment,
    Turn,
    ViewGeometry,
)

Output = Literal["panoptic", "instance", "semantic"]
SURE = 0.5
"""Oracle gap of instances: least score of a candidate that counts as given out."""


@dataclass(frozen=True)
class Task(base.Base):
    """Options of generic segmentation."""

    labels: Literal["text", "fixed"] = "text"
    """"text": the categories stand in the question and compete as concepts; "fixed": no text, a linear head over the
    data set's label list (stage 1)."""
    full_list: float = 0.5
    """Training: probability of the whole category list, shuffled; else the present categories and k absent ones."""
    max_concepts: int = 10000
    """Training: k is uniform in 0 .. max_concepts - present (all absent ones where there are fewer than k), and lists
    longer than this are never given whole. 10000 is the paper's value."""
    outputs: tuple[Output, ...] = ("panoptic", "instance", "semantic")
    """What evaluation makes and scores."""
    score_threshold: float = 0.0
    """Least probability of a panoptic segment or instance: 0 for scores, about 0.5 for the eye."""
    mask_threshold: float = 0.5
    overlap: float = 0.8
    """Least part of a query's mask that must win its pixels for a panoptic segment."""
    top_k: int = 200
    """Number of instance candidates per image."""
    semantic_average: Literal["canvas", "original"] = "canvas"
    """Where class and mask probabilities are multiplied: on the canvas, then resized (the paper), or in original pixels
    (X-SAM's branch main)."""

    name: ClassVar[str] = "generic_seg"

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask for all categories at once; crowd regions are no targets. Raises UserError without categories, and
        for an object that has none: it would be taken for one of another.
        """
        names = _categories(sample).names
        targets = [i for i in sample.instances if not i.is_crowd]
        for row, target in enumerate(sample.instances):
            if not target.is_crowd and not 0 <= target.category < len(names):
                raise UserError(
                    f"{sample.key}: object {row} has no category, and generic_seg asks for every object by its "
                    "category; name it, or mix this data set in with another task"
                )
        rows = tuple(i.mask for i in targets)
        if self.labels == "fixed":
            return Formatted(queries=(Query(None, (), rows, tuple(i.category for i in targets)),))
        listed = self._listed(len(names), {i.category for i in targets}, rng) if train else range(len(names))
        place = {category: k for k, category in enumerate(listed)}
        question = phrasing.pick(phrasing.CATEGORIES, rng, train)
        question = question.format(names=", ".join(phrasing.span(names[c]) for c in listed))
        answer = phrasing.pick(phrasing.ANSWER, rng, train)
        query = Query(0, tuple(range(len(listed))), rows, tuple(place[i.category] for i in targets))
        return Formatted((Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer)), (query,))

    def _listed(self, count: int, present: set[int], rng: np.random.Generator) -> list[int]:
        whole = rng.random() < self.full_list
        if whole and count <= self.max_concepts:
            return [int(c) for c in rng.permutation(count)]
        absent = np.array([c for c in range(count) if c not in present], np.int64)
        extra = int(rng.integers(max(self.max_concepts - len(present), 0) + 1))
        least = 0 if present else 1
        chosen = rng.permutation(absent)[: max(extra, least)]
        return [int(c) for c in rng.permutation(np.array([*sorted(present), *chosen], np.int64))]

    def decode(
        self, output: ModelOutput, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """Make the panoptic and semantic maps and the instances (things only) from the sample's one query.

        ``segments`` belong to the panoptic map; the instance candidates are ``extra["instances"]``.
        """
        categories = _categories(sample)
        count = len(categories.names)
        mask_logits = output.mask_logits[-1, queries[0]]
        logits = output.class_logits[-1, queries[0]]
        # in a mixed batch the concept columns are padded before the background column
        logits = logits[:, [*range(count), logits.shape[1] - 1]]
        segments: list[Segment] = []
        id_map = semantic = None
        if "panoptic" in self.outputs:
            id_map, segments = postprocess.panoptic(
                mask_logits,
                logits,
                g,
                is_thing=categories.is_thing,
                score_threshold=self.score_threshold,
                mask_threshold=self.mask_threshold,
                overlap=self.overlap,
            )
        if "semantic" in self.outputs:
            semantic = postprocess.semantic(mask_logits, logits, g, average=self.semantic_average)
        extra: dict[str, Any] = {}
        if "instance" in self.outputs:
            found = postprocess.instances(
                mask_logits, logits, g, top_k=self.top_k, score_threshold=self.score_threshold
            )
            extra["instances"] = tuple(_named(s, categories) for s in found if categories.is_thing[s.category])
        named = tuple(_named(s, categories) for s in segments)
        if self.outputs != ("semantic",):
            given = named or [s for s in extra.get("instances", ()) if s.score >= SURE]
            # a panoptic map leaves no pixel empty; what it says about void counts neither way, as for PQ
            void = encode(truth.segment_map(sample) == 0) if named else sample.ignore
            extra["oracle"] = base.gap_of_instances(dataclasses.replace(sample, ignore=void), given, mask_logits, g)
        return Prediction(sample.key, named, panoptic=id_map, semantic=semantic, text=text, extra=extra)

    def metrics(self) -> list[Metric]:
        """PQ, AP and mIoU, as far as ``outputs`` has them, and the oracle gap of segments."""
        kinds = {"panoptic": PanopticQuality, "instance": AveragePrecision, "semantic": MeanIoU}
        scores: list[Metric] = [kinds[output]() for output in self.outputs]
        return scores if self.outputs == ("semantic",) else [*scores, OracleGap()]

    @staticmethod
    def example() -> Sample:
        """A 8 x 12 picture of two circles and a square on grass under sky, with a crowd region."""
        from PIL import Image

        id_map = np.zeros((8, 12), np.int32)
        id_map[:4], id_map[4:, :10] = 7, 5
        id_map[1:3, 1:3], id_map[5:7, 1:4], id_map[2:6, 6:9], id_map[6:8, 8:10] = 11, 12, 13, 14
        categories = Categories(("circle", "square", "grass", "sky"), (1, 2, 5, 9), (True, True, False, False))
        rows = ((3, 7), (2, 5), (0, 11), (0, 12), (1, 13), (0, 14))
        instances = tuple(Instance(k, c, is_crowd=i == 14, id=i) for k, (c, i) in enumerate(rows))
        masks = Masks((8, 12), id_map=id_map, ids=tuple(i for _, i in rows))
        image = Image.fromarray((id_map[..., None] * [10, 15, 5] % 255).astype(np.uint8))
        return Sample("example/generic", (image,), (8, 12), masks, instances, categories)


def _categories(sample: Sample) -> Categories:
    if sample.categories is None or not sample.categories.names:
        raise UserError(f"{sample.key}: task generic_seg needs a source with categories; use one that has them")
    return sample.categories


def _named(segment: Segment, categories: Categories) -> Segment:
    return Segment(segment.mask, segment.category, segment.score, categories.names[segment.category])
