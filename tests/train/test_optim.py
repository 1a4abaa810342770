"""Which parameters learn and how the rate moves."""

import math

import pytest
import torch
from torch import nn

from xseg.config import LrGroup, Schedule, StageRecipe, load_recipe
from xseg.errors import UserError
from xseg.train import optim

RECIPE = load_recipe(StageRecipe, "tiny/s1_segmentor", ["muon=0"])


def model() -> nn.Module:
    net = nn.Module()
    net.encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    net.head = nn.Linear(4, 2)
    net.unread = nn.Linear(2, 2).requires_grad_(False)
    return net


def test_first_match_wins_and_the_rest_is_frozen() -> None:
    net = model()
    narrow, wide = optim.select(
        net, [LrGroup(match=r"encoder\.0\.weight", lr=1e-3), LrGroup(match=r"encoder\.", lr=1e-4)]
    )
    assert narrow.names == ("encoder.0.weight",)
    assert set(wide.names) == {"encoder.0.bias", "encoder.1.weight", "encoder.1.bias"}
    learns = {n for n, p in net.named_parameters() if p.requires_grad}
    assert learns == {*narrow.names, *wide.names}


def test_what_the_model_froze_stays_frozen() -> None:
    net = model()
    (everything,) = optim.select(net, [LrGroup(match=".*", lr=1e-3)])
    assert not any(name.startswith("unread") for name in everything.names)
    assert not net.unread.weight.requires_grad


@pytest.mark.parametrize(
    ("matches", "words"),
    [
        (["encodr"], "did you mean 'encoder'"),
        (["ncoder"], "begin of the name"),
        ([".*", "head"], "above it took all 2"),
    ],
)
def test_an_entry_without_parameters_is_an_error(matches: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        optim.select(model(), [LrGroup(match=m, lr=1e-3) for m in matches])


def test_vectors_can_be_spared_from_decay() -> None:
    net = model()
    groups = [LrGroup(match="encoder", lr=1e-3, weight_decay=0.1, decay_vectors=False), LrGroup(match="head", lr=1e-4)]
    chosen = optim.select(net, groups)
    built = optim.build(net, chosen, RECIPE.model_copy(update={"betas": (0.9, 0.98)})).param_groups
    shapes = [(g["lr"], g["weight_decay"], sorted(p.ndim for p in g["params"])) for g in built]
    assert shapes == [(1e-3, 0.1, [2]), (1e-3, 0.0, [1, 1, 1]), (1e-4, 0.05, [1, 2])]
    text = optim.table(net, chosen)
    assert "encoder" in text and "frozen" in text and str(2 * 2 + 2) in text.splitlines()[-1]


def test_warmup_is_linear_from_nearly_zero() -> None:
    schedule = Schedule(kind="constant", warmup=0.1)
    values = [optim.factor(s, 100, schedule) for s in range(12)]
    assert values[0] == pytest.approx(1e-5) and values[5] == pytest.approx(0.5, abs=1e-5)
    assert values[10] == values[11] == 1.0


def test_seg_vectors_grow_to_their_length_and_stay() -> None:
    assert [optim.seg_share(step, 10, 0.4) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert {optim.seg_share(step, 10, 0.0) for step in range(10)} == {1.0}
    assert optim.seg_share(9, 10, 1.0) == 1.0, "what a run exports has its full length"


def test_cosine_falls_to_its_floor_and_step_at_its_milestones() -> None:
    cosine = Schedule(kind="cosine", warmup=0.0, floor=0.1)
    assert optim.factor(0, 200, cosine) == 1.0
    assert optim.factor(100, 200, cosine) == pytest.approx(0.55)
    assert optim.factor(199, 200, cosine) == pytest.approx(0.1, abs=1e-3)
    paper = Schedule(kind="step", warmup=0.03, milestones=[24 / 36, 30 / 36], gamma=0.1)
    by_epoch = [optim.factor(epoch * 10, 360, paper) for epoch in (23, 24, 29, 30, 35)]
    assert by_epoch == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    assert all(math.isfinite(optim.factor(0, 1, s)) for s in (cosine, paper))


def test_rates_keep_their_proportion() -> None:
    net = model()
    groups = [LrGroup(match="head", lr=1e-3), LrGroup(match=".*", lr=1e-4)]
    optimizer = optim.build(net, optim.select(net, groups), RECIPE)
    base = [g["lr"] for g in optimizer.param_groups]
    optim.set_rates(optimizer, base, 0.5)
    optim.set_rates(optimizer, base, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2.5e-4, 2.5e-5])
    assert isinstance(optimizer, torch.optim.AdamW)
