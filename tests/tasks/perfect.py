"""A model output that says exactly what the annotation says, built from a sample and its queries."""

import torch

from xseg.metrics import truth
from xseg.types import Formatted, ModelOutput, Query, Sample, ViewGeometry

LOUD = 30.0


def geometry_of(sample: Sample) -> ViewGeometry:
    """A view that changes nothing: the canvas is the image padded to a square."""
    return ViewGeometry(sample.size, sample.size, max(sample.size))


def perfect_output(sample: Sample, formatted: Formatted, *, spare: int = 2, pad: int = 0) -> ModelOutput:
    """Each target gets a decoder query of its own, crowd regions too; ``spare`` queries say background.

    ``pad`` adds the concept columns that a mixed batch would add before the background column.
    """
    side = max(sample.size)
    rows = [_targets(sample, formatted, q) for q in formatted.queries]
    count = max(len(r) for r in rows) + spare
    classes = max(len(q.concepts) for q in formatted.queries) or len(sample.categories.names)  # type: ignore[union-attr]
    masks = torch.full((1, len(rows), count, side, side), -LOUD)
    logits = torch.zeros(1, len(rows), count, classes + pad + 1)
    logits[..., classes : classes + pad] = -1e9
    height, width = sample.size
    for q, targets in enumerate(rows):
        logits[0, q, len(targets) :, -1] = LOUD
        for k, (mask_row, category) in enumerate(targets):
            dense = torch.from_numpy(truth.mask(sample.masks, mask_row))  # type: ignore[arg-type]
            masks[0, q, k, :height, :width][dense] = LOUD
            logits[0, q, k, category] = LOUD
    return ModelOutput(masks, logits, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))


def _targets(sample: Sample, formatted: Formatted, query: Query) -> list[tuple[int, int]]:
    """(mask row, class column) of a query; a query over all categories also gets the crowd regions."""
    found = list(zip(query.instances, query.classes, strict=True))
    if sample.categories is not None and len(query.concepts) != 1:
        found += [(i.mask, i.category) for i in sample.instances if i.is_crowd]
    return found
