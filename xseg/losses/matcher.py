"""Which prediction answers for which target mask: Hungarian matching of every decoder prediction (Mask2Former)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from xseg.config import LossWeights
from xseg.losses.points import Randoms, chunks, sample_logits, uniform
from xseg.losses.targets import Pixels, Targets
from xseg.types import ModelOutput


@dataclass(frozen=True)
class Matches:
    """R matched pairs for each of L predictions, grouped by query, object queries ascending within one."""

    counts: list[int]
    """Pairs of each query of the batch: min(object queries, masks); they sum to R."""
    item: Tensor
    """(R,) int64 query of the batch; the same for every layer."""
    query: Tensor
    """(L, R) int64 object query."""
    row: Tensor
    """(L, R) int64 row of the target masks."""


def pair_costs(logits: Tensor, pixels: Pixels, weights: LossWeights) -> Tensor:
    """Weighted BCE + Dice of every prediction with every target: (G, N, P), (G, m, P) -> (G, N, m).

    BCE is linear in the target, so it needs one softplus per logit and one product with the targets.
    """
    target, weight = pixels.target.transpose(1, 2), pixels.weight.transpose(1, 2).expand(len(logits), -1, -1)
    inner = logits.sigmoid() @ torch.cat([target, weight], dim=2)
    overlap, size = inner[..., :-1], inner[..., -1:] + target.sum(1, keepdim=True)
    bce = (F.softplus(logits) @ weight - logits @ target) / weight.sum(1, keepdim=True).clamp_min(1)
    dice = 1 - (2 * overlap + 1) / (size + 1)
    return weights.mask * bce + weights.dice * dice


Solve = Callable[[Sequence[Tensor], Sequence[tuple[int, int]], Targets], np.ndarray]
"""``solve(costs, ranges, targets)``: costs (L, items, N, m) of ranges of queries -> pairs (L, 2, R): object query,
row."""


def hungarian(costs: Sequence[Tensor], ranges: Sequence[tuple[int, int]], targets: Targets) -> np.ndarray:
    """Pairs of the least total cost; all costs come to the host in one copy."""
    flat = torch.cat([c.flatten() for c in costs]).nan_to_num(1e10).clamp(-1e10, 1e10).cpu().numpy()
    pairs: list[list[np.ndarray]] = [[] for _ in range(len(costs[0]))]
    start = 0
    for (first, last), cost in zip(ranges, costs, strict=True):
        block = flat[start : start + cost.numel()].reshape(cost.shape)
        start += cost.numel()
        for layer, found in enumerate(pairs):
            for item in range(first, last):
                query, column = linear_sum_assignment(block[layer, item - first, :, : targets.counts[item]])
                found.append(np.stack([query, column + targets.starts[item]]))
    return np.stack([np.concatenate(p, axis=1) for p in pairs])


@torch.no_grad()
def match(
    output: ModelOutput,
    targets: Targets,
    weights: LossWeights,
    randoms: Randoms | None,
    solve: Solve = hungarian,
) -> Matches:
    """Match every prediction of every query with its targets at the least total cost.

    Cost = match_class * (-probability) + mask * BCE + dice * Dice on points shared by all masks of a query. All layers
    are one cost tensor.
    """
    layers, items, queries = output.mask_logits.shape[:3]
    device = output.mask_logits.device
    counts = [min(queries, n) for n in targets.counts]
    if not sum(counts):
        empty = torch.zeros(layers, 0, dtype=torch.long, device=device)
        return Matches(counts, empty.new_zeros(0), empty, empty)
    source = _Source(output, targets, weights, randoms)
    ranges = [(r.start, r.stop) for r in chunks(items, source.per_item, device) if sum(targets.counts[r])]
    costs = [source.costs(first, last) for first, last in ranges]
    both = torch.from_numpy(solve(costs, ranges, targets)).to(device)
    owner = torch.repeat_interleave(torch.tensor(counts)).to(device)
    return Matches(counts, owner, both[:, 0], both[:, 1])


class _Source:
    """Where costs come from: the predictions and targets of a range of queries on the compared pixels."""

    def __init__(self, output: ModelOutput, targets: Targets, weights: LossWeights, randoms: Randoms | None) -> None:
        self.output, self.targets, self.weights = output, targets, weights
        layers, items, queries, height, width = output.mask_logits.shape
        if weights.points == "sampled":
            shape = (weights.num_points, 2)
            device = output.mask_logits.device
            assert randoms is not None
            self.coords = uniform(randoms, "matcher", layers, [1] * items, shape, device)
        else:
            self.pixels = targets.dense(weights.points, (height, width))
        points = weights.num_points if weights.points == "sampled" else self.pixels.target.shape[1]
        self.per_item = layers * queries * points

    def costs(self, first: int, last: int) -> Tensor:
        """(L, items, N, m) costs of queries ``first`` to ``last``, m = their largest number of targets."""
        counts, starts = self.targets.counts[first:last], self.targets.starts[first:last]
        most = max(counts)
        rows = torch.tensor([[s + min(k, n - 1) if n else 0 for k in range(most)] for s, n in zip(starts, counts)])
        rows = rows.to(self.targets.masks.device)
        logits = self.output.mask_logits[:, first:last].float()
        pixel_costs = self._sampled if self.weights.points == "sampled" else self._dense
        cost = pixel_costs(logits, rows, first)
        prob = self.output.class_logits[:, first:last].float().softmax(-1)
        classes = self.targets.classes[rows][None, :, None].expand(*prob.shape[:3], most)
        weight = self.weights.class_ if self.weights.match_class is None else self.weights.match_class
        return cost - weight * prob.gather(-1, classes)

    def _sampled(self, logits: Tensor, rows: Tensor, first: int) -> Tensor:
        layers, items, queries = logits.shape[:3]
        coords = self.coords[:, first : first + items].flatten(0, 1)
        item = torch.arange(first, first + items, device=rows.device).repeat(layers)
        rows, logits = rows.repeat(layers, 1), logits.flatten(0, 1)
        parts = [
            pair_costs(sample_logits(logits[c], coords[c]), self.targets.at(rows[c], item[c], coords[c]), self.weights)
            for c in chunks(len(logits), queries * self.weights.num_points, logits.device)
        ]
        return torch.cat(parts).view(layers, items, queries, -1)

    def _dense(self, logits: Tensor, rows: Tensor, first: int) -> Tensor:
        layers, items, queries = logits.shape[:3]
        values = dense_logits(logits.flatten(0, 2), self.weights.points, self.targets.masks.shape[-2:])
        # The pixels of a query are the same in every layer: its layers stand side by side as more predictions.
        values = values.view(layers, items, queries, -1).transpose(0, 1).flatten(1, 2)
        weight = self.pixels.weight[first : first + items, None]
        cost = pair_costs(values, Pixels(self.pixels.target[rows], weight), self.weights)
        return cost.view(items, layers, queries, -1).transpose(0, 1)


def dense_logits(logits: Tensor, points: str, canvas: tuple[int, ...]) -> Tensor:
    """(R, h, w) logits on every compared pixel: (R, P); "canvas" upsamples them bilinearly."""
    if points == "canvas":
        logits = F.interpolate(logits[:, None], size=tuple(canvas), mode="bilinear", align_corners=False)
    return logits.flatten(1)
