"""The target masks of a batch, grouped by query, and what they look like on the pixels that are compared."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xseg.losses.points import sample_masks
from xseg.types import Batch, Size


@dataclass(frozen=True)
class Pixels:
    """Targets on P compared pixels. Losses need only these two, since they are linear in the target."""

    target: Tensor
    """(..., P) float32, target value times weight."""
    weight: Tensor
    """(..., P) float32, 1 = counts, 0 = ignored, between = part of the cell counts."""


class Targets:
    """Target masks of one batch; rows of query i are ``starts[i] .. starts[i] + counts[i]``."""

    def __init__(self, batch: Batch) -> None:
        self.masks = batch.target_masks
        self.classes = batch.target_class
        self.ignore = batch.ignore
        self.counts: list[int] = [0] * len(batch.query_image)
        for query in batch.target_query.tolist():
            self.counts[query] += 1
        self.starts = [sum(self.counts[:i]) for i in range(len(self.counts))]

    def at(self, rows: Tensor, items: Tensor, coords: Tensor) -> Pixels:
        """Masks ``rows`` (G, m) of queries ``items`` (G,) at (G, P, 2): target (G, m, P), weight (G or 1, 1, P)."""
        target = sample_masks(self.masks, rows, coords)
        if self.ignore is None:
            return Pixels(target, torch.ones_like(target[:1, :1]))
        # A point counts only when none of the four pixels around it is ignored.
        weight = (sample_masks(self.ignore, items[:, None], coords) == 0).to(target)
        return Pixels(target * weight, weight)

    def dense(self, points: Literal["grid", "canvas"], size: Size) -> Pixels:
        """All M masks on every pixel: target (M, P), weight (Q, P); "grid" averages down to ``size``."""
        if self.ignore is None:
            target = reduce(self.masks, points, size)
            return Pixels(target, target.new_ones(1, target.shape[1]).expand(len(self.counts), -1))
        free = 1 - self.ignore
        items = torch.repeat_interleave(torch.tensor(self.counts)).to(self.masks.device)
        return Pixels(reduce(self.masks * free[items], points, size), reduce(free, points, size))


def reduce(masks: Tensor, points: Literal["grid", "canvas"], size: Size) -> Tensor:
    """(M, S, S) uint8 -> (M, P) float32: as it is, or averaged over the cells of the prediction grid."""
    values = masks.float()
    if points == "canvas":
        return values.flatten(1)
    if not len(masks):
        return values.new_zeros(0, size[0] * size[1])
    return F.interpolate(values[:, None], size, mode="area").flatten(1)
