import math
from collections import Counter
from pathlib import Path

import pytest
from data_stubs import coco_file
from hypothesis import given, settings
from hypothesis import strategies as st

from xseg.config import Mixture
from xseg.data.dataset import Preparation
from xseg.data.mixture import Item, Plan, load_mixture, repeat_factors
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def flat(plan: Plan, step: int) -> list[Item]:
    return [item for rank in plan.batch(step) for micro in rank for item in micro]


def test_repeat_factors_by_hand() -> None:
    assert repeat_factors([10, 90], 0.1) == [1.0, 1.0]
    assert repeat_factors([1, 99], 0.1) == [math.sqrt(10), 1.0]
    assert repeat_factors([1, 99], None) == [1.0, 1.0]
    assert int(repeat_factors([239, 1_399_761], 0.1)[0]) == 24, "LISA's 239 samples of section 3.4"


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 5), st.floats(1, 4))
def test_an_epoch(lengths: list[int], size: int, world: int, accumulate: int, epoch: int, factor: float) -> None:
    plan = Plan(lengths, [factor] * len(lengths), size, world, accumulate, seed=1)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    drawn: Counter[Item] = Counter()
    for step in steps:
        batch = plan.batch(step)
        assert [[len(micro) for micro in rank] for rank in batch] == [[size] * accumulate] * world
        items = flat(plan, step)
        assert len({item.dataset for item in items}) == 1, "one source per global batch"
        drawn.update(items)
    for number, length in enumerate(lengths):
        draws = int(factor * length)
        stream = range(epoch * draws, (epoch + 1) * draws)
        wanted = {Item(number, p % length, p // length) for p in stream}
        mine = {item: n for item, n in drawn.items() if item.dataset == number}
        assert set(mine) == wanted
        extra = sum(mine.values()) - draws
        assert 0 <= extra < plan.global_batch, "only the last batch is filled up"
        assert max(mine.values()) - 1 <= math.ceil(extra / draws), "and with different draws"


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 3))
def test_a_mixed_epoch_has_the_same_draws_in_fewer_batches(lengths: list[int], size: int, epoch: int) -> None:
    factors = [1.5] * len(lengths)
    mixed, plain = (Plan(lengths, factors, size, 2, mixed=kind, seed=3) for kind in (True, False))
    drawn: list[set[Item]] = []
    for plan in (mixed, plain):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        drawn.append({item for step in steps for item in flat(plan, step)})
    assert drawn[0] == drawn[1]
    assert mixed.steps_per_epoch == -(-len(drawn[0]) // mixed.global_batch) <= plain.steps_per_epoch


def test_mixed_batches_mix() -> None:
    plan = Plan([300, 300], [1, 1], 4, 2, mixed=True)
    kinds = [len({item.dataset for item in flat(plan, step)}) for step in range(plan.steps_per_epoch)]
    assert sum(k == 2 for k in kinds) > 0.9 * len(kinds)
    split = Plan([300, 300], [1, 1], 2, 2, 2, mixed=True)
    assert all(Counter(flat(split, s)) == Counter(flat(plan, s)) for s in range(plan.steps_per_epoch))


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.integers(1, 3))
def test_over_epochs_every_sample_is_drawn_equally_often(lengths: list[int], size: int) -> None:
    plan = Plan(lengths, [1.7] * len(lengths), size)
    for number, length in enumerate(lengths):
        draws, seen = int(1.7 * length), set()
        for step in range(length * plan.steps_per_epoch):
            seen |= {item for item in flat(plan, step) if item.dataset == number}
        assert Counter(item.sample for item in seen) == dict.fromkeys(range(length), draws)


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.integers(0, 60))
def test_resuming_anywhere_and_splitting_anyhow_changes_nothing(lengths: list[int], step: int) -> None:
    whole = Plan(lengths, [2.0] * len(lengths), 12, seed=5)
    walked = Plan(lengths, [2.0] * len(lengths), 12, seed=5)
    for earlier in range(step):
        walked.batch(earlier)
    assert walked.batch(step) == whole.batch(step)
    for size, world, accumulate in ((3, 4, 1), (2, 3, 2), (1, 1, 12), (6, 1, 2)):
        split = Plan(lengths, [2.0] * len(lengths), size, world, accumulate, seed=5)
        assert split.steps_per_epoch == whole.steps_per_epoch
        assert Counter(flat(split, step)) == Counter(flat(whole, step))


def test_epochs_and_seeds_differ_and_ranks_are_disjoint() -> None:
    plan = Plan([500, 300], [1, 1], 5, 4, 2, seed=0)
    n = plan.steps_per_epoch
    assert [flat(plan, s) for s in range(n)] != [flat(plan, s + n) for s in range(n)]
    other = Plan([500, 300], [1, 1], 5, 4, 2, seed=1)
    assert [flat(plan, s) for s in range(n)] != [flat(other, s) for s in range(n)]
    sources = [flat(plan, s)[0].dataset for s in range(n)]
    assert sources != sorted(sources) and sources != sorted(sources, reverse=True), "sources are mixed over the epoch"
    full = [s for s in range(n) if len(set(flat(plan, s))) == plan.global_batch]
    assert len(full) >= n - 2
    for step in full:
        ranks = [{item for micro in rank for item in micro} for rank in plan.batch(step)]
        assert sum(map(len, ranks)) == len(set.union(*ranks)) == plan.global_batch


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[4, 0\] samples"):
        Plan([4, 0], [1, 1], 2)


def test_a_mixture_applies_its_entries(tmp_path: Path) -> None:
    coco_file(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "source: coco\noptions: {images: pictures, instances: instances.json}\ntask: {name: conversation}\n"
    )
    entry = {"recipe": "a"}
    mixture = Mixture.model_validate({"datasets": [entry, {**entry, "limit": 1, "repeat": 3.0}], "balance": 0.9})
    preparation = Preparation(None, ViewSizes(32, 0))
    datasets, factors = load_mixture(mixture, root=tmp_path, preparation=preparation, beside=tmp_path)
    assert [len(d) for d in datasets] == [2, 1]
    assert factors == pytest.approx([math.sqrt(0.9 * 3 / 2), 3 * math.sqrt(0.9 * 3)])
