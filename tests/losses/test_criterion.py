"""The criterion: exact under any split of the global batch, connected when there is nothing to learn."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from loss_cases import make_batch, make_output, random_case
from torch import Tensor

from xseg.config import LossWeights
from xseg.errors import UserError
from xseg.losses.criterion import Criterion
from xseg.losses.points import Draw, generator
from xseg.types import Batch, ModelOutput

MODES = ["sampled", "grid", "canvas"]


def keyed(first: int) -> Draw:
    """Randoms that depend on the place in the global batch, so that a split does not change them."""
    kinds = ["matcher", "candidates", "remainder"]

    def draw(kind: str, layer: int, item: int, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator("cpu", kinds.index(kind), layer, first + item))

    return draw


def with_text(output: ModelOutput, batch: Batch, tokens: list[int]) -> tuple[ModelOutput, Batch]:
    """Give sample i ``tokens[i]`` supervised tokens."""
    g = torch.Generator().manual_seed(3)
    labels = torch.full((len(tokens), 8), -100)
    for row, n in zip(labels, tokens, strict=True):
        row[8 - n :] = torch.randint(5, (n,), generator=g)
    logits = torch.randn(sum(tokens), 5, generator=g, requires_grad=True)
    output = dataclasses.replace(output, lm_logits=logits, lm_labels=labels[labels != -100])
    return output, dataclasses.replace(batch, labels=labels)


def part(output: ModelOutput, batch: Batch, first: int, last: int) -> tuple[ModelOutput, Batch]:
    """Samples ``first`` to ``last`` of a batch with one query per sample."""
    mine = (batch.target_query >= first) & (batch.target_query < last)
    tokens = (batch.labels != -100).sum(1)
    a, b = int(tokens[:first].sum()), int(tokens[:last].sum())
    piece = dataclasses.replace(
        batch,
        labels=batch.labels[first:last],
        query_image=batch.query_image[first:last] - first,
        query_concepts=batch.query_concepts[first:last],
        target_masks=batch.target_masks[mine],
        target_query=batch.target_query[mine] - first,
        target_class=batch.target_class[mine],
        ignore=None if batch.ignore is None else batch.ignore[first:last],
    )
    cut = dataclasses.replace(
        output,
        mask_logits=output.mask_logits[:, first:last],
        class_logits=output.class_logits[:, first:last],
        lm_logits=output.lm_logits[a:b],
        lm_labels=output.lm_labels[a:b],
        pixel_logits=None if output.pixel_logits is None else output.pixel_logits[first:last],
    )
    return cut, piece


@pytest.mark.parametrize("points", MODES)
@pytest.mark.parametrize("cuts", [[0, 1, 5], [0, 3, 5], [0, 1, 2, 3, 4, 5]])
def test_the_loss_and_its_gradient_do_not_depend_on_the_split(points: str, cuts: list[int]) -> None:
    output, batch = with_text(*random_case([3, 0, 1, 6, 2]), [4, 1, 0, 7, 2])
    pixels = torch.randn(5, 5, 6, 6, generator=generator("cpu", 9)).requires_grad_()
    ignore = torch.zeros(5, 24, 24, dtype=torch.uint8)
    ignore[2:, 4:9] = 1
    output = dataclasses.replace(output, pixel_logits=pixels)
    batch = dataclasses.replace(batch, ignore=ignore)
    weights = LossWeights(points=points, num_points=40, pixel_class=1.5, pixel_thing=4.0)
    criterion = Criterion(weights, is_thing=[True, False, True, False])
    leaves = [output.mask_logits, output.class_logits, output.lm_logits, pixels]
    whole = criterion(output, batch, draw=keyed(0))
    expected = torch.autograd.grad(whole.total, leaves)
    pieces = [(first, *part(output, batch, first, last)) for first, last in pairwise(cuts)]
    totals = torch.stack([criterion.totals(b, 5) for _, _, b in pieces]).sum(0)
    split = [criterion(o, b, totals=totals, draw=keyed(first)) for first, o, b in pieces]
    total = torch.stack([s.total for s in split]).sum()
    torch.testing.assert_close(total, whole.total, rtol=1e-5, atol=0)
    for name, value in whole.terms.items():
        summed = torch.stack([s.terms[name] for s in split]).sum()
        torch.testing.assert_close(summed, value, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("points", MODES)
def test_a_perfect_answer_costs_nothing_and_a_wrong_one_does(points: str) -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, :16], masks[1, 16:, 8:24] = 1, 1
    batch = make_batch([masks], [torch.tensor([1, 0])])
    logits = torch.full((1, 1, 3, 8, 8), -40.0)
    logits[0, 0, 2], logits[0, 0, 0] = F.avg_pool2d(masks.float(), 4) * 80 - 40
    classes = torch.full((1, 1, 3, 3), -40.0)
    classes[0, 0, 2, 1] = classes[0, 0, 0, 0] = classes[0, 0, 1, 2] = 40.0
    criterion = Criterion(LossWeights(points=points, num_points=2000, importance=0.0))
    good = criterion(make_output(logits, classes), batch, draw=generator("cpu", 0))
    bad = criterion(make_output(-logits, classes), batch, draw=generator("cpu", 0))
    assert good.terms["class"] < 1e-6
    # Upsampled logits are soft between two grid cells, so only "grid" is exactly right at the border.
    assert good.terms["dice"] < (1e-4 if points == "grid" else 0.3)
    assert bad.terms["mask"] > good.terms["mask"] + 40
    assert bad.terms["dice"] > good.terms["dice"] + 0.8


def test_by_hand_on_one_pixel() -> None:
    batch = make_batch([torch.ones(1, 4, 4, dtype=torch.uint8)], [torch.tensor([0])])
    output = make_output(torch.zeros(1, 1, 2, 1, 1), torch.zeros(1, 1, 2, 2))
    terms = Criterion(LossWeights(points="grid"))(output, batch).terms
    ln2 = torch.log(torch.tensor(2.0)).item()
    assert terms["class"].item() == pytest.approx(2 * ln2)
    assert terms["mask"].item() == pytest.approx(5 * ln2)
    assert terms["dice"].item() == pytest.approx(5 * (1 - (2 * 0.5 + 1) / (0.5 + 1 + 1)))
    assert set(terms) == {"lm", "class", "mask", "dice"}


@pytest.mark.parametrize("points", MODES)
@pytest.mark.parametrize("counts", [[], [0, 0], [0]])
def test_nothing_to_learn_is_finite_and_connected(points: str, counts: list[int]) -> None:
    output, batch = random_case(counts)
    batch = dataclasses.replace(batch, target_masks=torch.zeros(0, 24, 24, dtype=torch.uint8))
    touch = torch.zeros((), requires_grad=True)
    output = dataclasses.replace(output, touch=touch * 0.0)
    losses = Criterion(LossWeights(points=points, num_points=16))(output, batch, draw=generator("cpu", 0))
    losses.total.backward()
    assert losses.total.isfinite() and touch.grad is not None
    if counts:
        assert output.mask_logits.grad is not None and not output.mask_logits.grad.any()
        assert output.class_logits.grad is not None and output.class_logits.grad.any()


def test_text_alone() -> None:
    output, batch = with_text(*random_case([]), [5])
    losses = Criterion(LossWeights(points="grid", lm=2.0))(output, batch)
    assert list(losses.terms) == ["lm"]
    expected = 2 * F.cross_entropy(output.lm_logits, output.lm_labels)
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()


@pytest.mark.parametrize("points", MODES)
def test_ignored_pixels_neither_match_nor_train(points: str) -> None:
    output, batch = random_case([2, 3], grid=6, canvas=24)
    ignore = torch.zeros(2, 24, 24, dtype=torch.uint8)
    ignore[0, :, 12:] = 1
    flipped = batch.target_masks.clone()
    flipped[:2, :, 12:] = 1 - flipped[:2, :, 12:]
    other = output.mask_logits.detach().clone()
    # The bilinear reach of a grid cell is one cell, so the column next to the border still counts.
    other[:, 0, :, :, 4:] = 9.0
    criterion = Criterion(LossWeights(points=points, num_points=64, importance=0.0))

    def run(masks: Tensor, logits: Tensor) -> float:
        given = dataclasses.replace(batch, ignore=ignore, target_masks=masks)
        result = criterion(dataclasses.replace(output, mask_logits=logits), given, draw=generator("cpu", 4))
        return result.total.item()

    assert run(flipped, other) == pytest.approx(run(batch.target_masks, output.mask_logits), rel=1e-5)
    open_masks = criterion(output, dataclasses.replace(batch, target_masks=flipped), draw=generator("cpu", 4))
    assert open_masks.total.item() != pytest.approx(run(flipped, output.mask_logits), rel=1e-3)


def test_low_precision_logits_are_compared_in_float32() -> None:
    output, batch = random_case([2, 1])
    half = make_output(output.mask_logits.detach().bfloat16(), output.class_logits.detach().bfloat16())
    rounded = make_output(half.mask_logits.float(), half.class_logits.float())
    criterion = Criterion(LossWeights(points="canvas"))
    torch.testing.assert_close(criterion(half, batch).total, criterion(rounded, batch).total)


def test_dense_class_loss_counts_things_more_and_leaves_ignored_cells_out() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, :4], masks[1, 4:, :4] = 1, 1
    output, batch = random_case([2], grid=2, canvas=8, labels=3)
    batch = dataclasses.replace(batch, target_masks=masks, target_class=torch.tensor([2, 0]))
    uniform = dataclasses.replace(output, pixel_logits=torch.zeros(1, 4, 2, 2))
    criterion = Criterion(LossWeights(points="grid", pixel_class=1, pixel_thing=4), is_thing=[True, False, False])
    ln4 = torch.log(torch.tensor(4.0)).item()
    # Four cells: two of stuff label 2, one of thing label 0 (counts four times), one of background.
    assert criterion(uniform, batch).terms["pixel_class"].item() == pytest.approx(7 / 4 * ln4)
    ignore = torch.zeros(1, 8, 8, dtype=torch.uint8)
    ignore[0, 4:, :4] = 1
    masked = criterion(uniform, dataclasses.replace(batch, ignore=ignore))
    assert masked.terms["pixel_class"].item() == pytest.approx(3 / 4 * ln4)
    right = torch.full((1, 4, 2, 2), -50.0)
    right[0, 2, 0], right[0, 0, 1, 0], right[0, 3, 1, 1] = 50.0, 50.0, 50.0
    assert criterion(dataclasses.replace(output, pixel_logits=right), batch).terms["pixel_class"] == 0


def test_mistakes_are_told() -> None:
    output, batch = random_case([1])
    with pytest.raises(UserError, match="pixel_classifier"):
        Criterion(LossWeights(points="grid", pixel_class=1.0))(output, batch)
    with pytest.raises(UserError, match="pixel_thing"):
        Criterion(LossWeights(pixel_class=1.0, pixel_thing=4.0))
    with pytest.raises(ValueError, match="Generator"):
        Criterion(LossWeights())(output, batch)
