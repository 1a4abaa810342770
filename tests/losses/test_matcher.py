"""Hungarian matching."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import make_batch, make_output, random_case

from xseg.config import LossWeights
from xseg.losses import points as points_module
from xseg.losses.criterion import Criterion
from xseg.losses.matcher import Matches, match
from xseg.losses.points import generator
from xseg.losses.targets import Targets
from xseg.types import Batch, ModelOutput


def plain_cost(output: ModelOutput, batch: Batch, layer: int, item: int) -> torch.Tensor:
    """The cost written out pair by pair on every pixel of the canvas."""
    rows = (batch.target_query == item).nonzero()[:, 0]
    side = batch.target_masks.shape[-1]
    logits = F.interpolate(output.mask_logits[layer, item][None].detach(), side, mode="bilinear")[0]
    prob = output.class_logits[layer, item].detach().softmax(-1)
    cost = torch.zeros(len(logits), len(rows))
    for n, x in enumerate(logits):
        for m, row in enumerate(rows):
            t = batch.target_masks[row].float()
            bce = F.binary_cross_entropy_with_logits(x, t)
            dice = 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)
            cost[n, m] = 5 * bce + 5 * dice - 2 * prob[n, batch.target_class[row]]
    return cost


def test_pairs_have_the_least_total_cost_of_all() -> None:
    output, batch = random_case([2, 0, 3], queries=4)
    matches = match(output, Targets(batch), LossWeights(points="canvas"), None)
    assert matches.counts == [2, 0, 3]
    for layer in range(3):
        for item, count in ((0, 2), (2, 3)):
            cost = plain_cost(output, batch, layer, item)
            mine = matches.item == item
            start = 0 if item == 0 else 2
            chosen = cost[matches.query[layer, mine], matches.row[layer, mine] - start].sum()
            best = min(cost[list(p), range(count)].sum() for p in permutations(range(4), count))
            assert chosen.item() == pytest.approx(best.item(), rel=1e-4)


def test_match_class_decides_alone_and_leaves_the_loss_as_it_is() -> None:
    output, batch = random_case([1, 1], queries=6)
    heavy = LossWeights.model_validate({"points": "canvas", "match_class": 1000})
    matches = match(output, Targets(batch), heavy, None)
    prob = output.class_logits.softmax(-1)
    for item, wanted in enumerate(batch.target_class.tolist()):
        surest = prob[:, item, :, wanted].argmax(1)
        assert torch.equal(matches.query[:, item], surest)
        best_mask = torch.stack([plain_cost(output, batch, layer, item)[:, 0].argmin() for layer in range(len(prob))])
        assert not torch.equal(best_mask, surest), "the case must tell the two apart"
    same_pairs = LossWeights.model_validate({"points": "canvas", "class": 3.0, "match_class": 2.0})
    theirs = match(output, Targets(batch), LossWeights(points="canvas"), None)
    assert same(theirs, match(output, Targets(batch), same_pairs, None))
    plain, thrice = (Criterion(w)(output, batch).terms for w in (LossWeights(points="canvas"), same_pairs))
    assert thrice["class"].item() == pytest.approx(1.5 * plain["class"].item(), rel=1e-5)
    assert torch.equal(thrice["mask"], plain["mask"])


def test_more_masks_than_predictions() -> None:
    output, batch = random_case([7, 1], queries=3)
    matches = match(output, Targets(batch), LossWeights(points="grid"), None)
    assert matches.counts == [3, 1]
    assert matches.query.shape == (3, 4)
    assert all(len(set(row[:3].tolist())) == 3 for row in matches.query)
    assert matches.row[:, :3].max() < 7 and (matches.row[:, 3] == 7).all()


def same(a: Matches, b: Matches) -> bool:
    return torch.equal(a.query, b.query) and torch.equal(a.row, b.row) and torch.equal(a.item, b.item)


@pytest.mark.parametrize("points", ["sampled", "grid", "canvas"])
def test_the_chunk_size_changes_nothing(points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output, batch = random_case([1, 3, 0, 2])
    weights = LossWeights(points=points, num_points=30)
    whole = match(output, Targets(batch), weights, generator("cpu", 5))
    monkeypatch.setitem(points_module.CHUNK, "cpu", 1)
    assert same(match(output, Targets(batch), weights, generator("cpu", 5)), whole)


def test_a_prediction_that_is_not_a_number_is_matched_last() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask_logits = torch.zeros(1, 1, 3, 4, 4)
    mask_logits[0, 0, 0] = float("nan")
    output = make_output(mask_logits, torch.zeros(1, 1, 3, 2))
    batch = make_batch([masks], [torch.tensor([0])])
    assert match(output, Targets(batch), LossWeights(points="grid"), None).query.item() != 0
