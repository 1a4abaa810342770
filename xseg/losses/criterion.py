"""The training loss: language, classes, masks (X-SAM section 3.3; Mask2Former), normalised over the global batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xseg.config import LossWeights
from xseg.errors import UserError
from xseg.losses.matcher import Matches, Solve, dense_logits, hungarian, match
from xseg.losses.points import Randoms, sample_logits, uncertain_points, uniform
from xseg.losses.targets import Pixels, Targets
from xseg.types import Batch, Losses, ModelOutput

MASKS, CLASS_WEIGHT, TOKENS, QUERIES = range(4)
"""Columns of ``Criterion.totals``."""


class Criterion:
    """Weighted loss terms of a micro-batch as its share of the global batch.

    Every term is a sum over the micro-batch divided by a count over the *global* batch (all ranks and all
    micro-batches of one optimiser step), so the sum of the losses over ranks and micro-batches is the loss of the
    global batch, however it is split. A framework that averages gradients over ranks (DDP, DeepSpeed) or divides by
    the accumulation steps needs the loss multiplied by the same number first.
    """

    def __init__(self, weights: LossWeights, is_thing: Sequence[bool] = (), solve: Solve = hungarian) -> None:
        """``is_thing``: for each label of the fixed label list, needed by ``pixel_thing`` only.

        ``solve`` chooses pairs from costs; a walk without values has nothing to compare and puts its own here.
        """
        if weights.pixel_class and weights.pixel_thing != 1 and not is_thing:
            raise UserError(
                f"loss.pixel_thing = {weights.pixel_thing}: the label list does not say which labels are things; "
                "use a data set with categories or set loss.pixel_thing to 1"
            )
        self.weights = weights
        self.is_thing = tuple(is_thing)
        self.solve = solve

    def totals(self, batch: Batch, num_queries: int) -> Tensor:
        """Return this micro-batch's (4,) float64 counts; sum them over micro-batches and ranks.

        Target masks; sum of the class weights over the N = ``num_queries`` predictions of every query; supervised
        tokens; queries.
        """
        masks = torch.bincount(batch.target_query, minlength=len(batch.query_image))
        matched = masks.clamp_max(num_queries).sum()
        queries = len(batch.query_image)
        class_weight = matched + self.weights.background * (queries * num_queries - matched)
        tokens = (batch.labels[:, 1:] != -100).sum()
        counts = [len(batch.target_query), class_weight, tokens, queries]
        return torch.stack([torch.as_tensor(c, dtype=torch.float64, device=batch.labels.device) for c in counts])

    def __call__(
        self, output: ModelOutput, batch: Batch, *, totals: Tensor | None = None, draw: Randoms | None = None
    ) -> Losses:
        """Return the loss of one micro-batch; ``totals`` are the global counts (default: those of this batch).

        ``draw`` gives the random points; a ValueError is raised when ``points`` is "sampled" and it is None.
        """
        if self.weights.points == "sampled" and draw is None:
            raise ValueError("sampled points need draw=: a torch.Generator (see losses.points.generator) or a Draw")
        counts = self.totals(batch, output.mask_logits.shape[2]) if totals is None else totals
        counts = counts.to(output.mask_logits.device, torch.float32)
        lm = F.cross_entropy(output.lm_logits.float(), output.lm_labels, reduction="sum")
        terms = {"lm": self.weights.lm * lm / counts[TOKENS].clamp_min(1)}
        if len(output.mask_logits) and len(batch.query_image):
            terms |= self._segmentation(output, batch, counts, draw)
        if output.pixel_logits is not None:
            terms["pixel_class"] = self._pixel_class(output.pixel_logits, batch, counts)
        elif self.weights.pixel_class and len(batch.query_image) and not batch.query_concepts.shape[1]:
            raise UserError(
                f"loss.pixel_class = {self.weights.pixel_class}: the model has no dense class head; set "
                "segmentor.pixel_classifier in the model recipe or loss.pixel_class to 0"
            )
        total = torch.stack(list(terms.values())).sum()
        if output.touch is not None:
            total = total + output.touch
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def _segmentation(
        self, output: ModelOutput, batch: Batch, counts: Tensor, draw: Randoms | None
    ) -> dict[str, Tensor]:
        targets = Targets(batch)
        matches = match(output, targets, self.weights, draw, self.solve)
        masks = counts[MASKS].clamp_min(1)
        bce, dice = self._mask_losses(output.mask_logits, targets, matches, draw)
        values = {
            "class": self.weights.class_
            * self._class_loss(output.class_logits, targets, matches)
            / counts[CLASS_WEIGHT],
            "mask": self.weights.mask * bce / masks,
            "dice": self.weights.dice * dice / masks,
        }
        last = len(output.mask_logits) - 1
        names = [*(f"_{i}" for i in range(last)), ""]
        order = [last, *range(last)]
        return {f"{name}{names[layer]}": value[layer] for layer in order for name, value in values.items()}

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Matches) -> Tensor:
        """(L,) sums of the weighted cross-entropy; unmatched predictions belong to the last column."""
        background = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:3], background, device=logits.device)
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        labels[layer, matches.item, matches.query] = targets.classes[matches.row]
        weight = torch.ones(background + 1, device=logits.device)
        weight[background] = self.weights.background
        loss = F.cross_entropy(logits.float().flatten(0, 2), labels.flatten(), weight, reduction="none")
        return loss.view(len(logits), -1).sum(1)

    def _mask_losses(
        self, logits: Tensor, targets: Targets, matches: Matches, draw: Randoms | None
    ) -> tuple[Tensor, Tensor]:
        """(L,) sums over matched masks of the mean BCE and of Dice."""
        layers, items, queries = logits.shape[:3]
        layer = torch.arange(layers, device=logits.device)[:, None]
        flat = ((layer * items + matches.item) * queries + matches.query).flatten()
        picked = logits.flatten(0, 2).index_select(0, flat).float()
        rows, item = matches.row.flatten(), matches.item.repeat(layers)
        if self.weights.points == "sampled":
            values, pixels = self._sampled(picked, targets, matches, draw)
        else:
            every = targets.dense(self.weights.points, (logits.shape[3], logits.shape[4]))
            pixels = Pixels(every.target[rows], every.weight[item])
            values = dense_logits(picked, self.weights.points, targets.masks.shape[-2:])
        counted = pixels.weight.sum(1).clamp_min(1)
        bce = (F.softplus(values) * pixels.weight - values * pixels.target).sum(1) / counted
        prob = values.sigmoid()
        size = (prob * pixels.weight).sum(1) + pixels.target.sum(1)
        dice = 1 - (2 * (prob * pixels.target).sum(1) + 1) / (size + 1)
        return bce.view(layers, -1).sum(1), dice.view(layers, -1).sum(1)

    def _sampled(
        self, picked: Tensor, targets: Targets, matches: Matches, draw: Randoms | None
    ) -> tuple[Tensor, Pixels]:
        """Values of (L R, h, w) matched logits and their targets at PointRend points."""
        assert draw is not None
        layers, points = len(matches.row), self.weights.num_points
        kept = int(self.weights.importance * points)
        many = [("candidates", int(points * self.weights.oversample)), ("remainder", points - kept)]
        candidates, remainder = (
            uniform(draw, kind, layers, matches.counts, (n, 2), picked.device).flatten(0, 1) for kind, n in many
        )
        coords = uncertain_points(picked, candidates, remainder, points)
        pixels = targets.at(matches.row.flatten()[:, None], matches.item.repeat(layers), coords)
        return sample_logits(picked[:, None], coords)[:, 0], Pixels(pixels.target[:, 0], pixels.weight[:, 0])

    def _pixel_class(self, logits: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        """Cross-entropy of every grid cell with the label that covers most of it; mean over queries and cells."""
        if not self.weights.pixel_class or batch.query_concepts.shape[1]:
            return logits.sum() * 0.0
        picked = logits[batch.query_image].float().flatten(2)
        queries, columns, cells = picked.shape
        pixels = Targets(batch).dense("grid", (logits.shape[2], logits.shape[3]))
        cover = picked.new_zeros(queries, columns, cells)
        cover.index_put_((batch.target_query, batch.target_class), pixels.target, accumulate=True)
        cover[:, -1] = pixels.weight - cover.sum(1)
        labels = cover.argmax(1)
        weight = picked.new_ones(columns)
        weight[: len(self.is_thing)] += (self.weights.pixel_thing - 1) * weight.new_tensor(self.is_thing)
        loss = F.cross_entropy(picked, labels, reduction="none") * weight[labels] * pixels.weight
        return self.weights.pixel_class * loss.sum() / (counts[QUERIES].clamp_min(1) * cells)
