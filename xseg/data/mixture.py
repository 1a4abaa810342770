"""Which sample is trained on when: a pure function of (seed, epoch, step) over several data sets."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xseg.config import DataRecipe, Mixture, load_recipe
from xseg.data.dataset import Dataset, Preparation, load_dataset
from xseg.data.lengths import lengths
from xseg.errors import UserError


class Item(NamedTuple):
    """One draw of a sample."""

    dataset: int
    sample: int
    epoch: int
    """How often this data set was gone through before: seeds the sample's wording and view."""


class Alike(NamedTuple):
    """What a plan sorts its draws by."""

    window: int
    """Global batches whose draws are sorted together."""
    lengths: tuple[np.ndarray, ...]
    """Per data set (its samples,), in any one unit."""


def load_mixture(
    mixture: Mixture, *, root: str | Path, preparation: Preparation, beside: Path | None = None
) -> tuple[list[Dataset], list[float]]:
    """Build every data set of a mixture, and the factor by which each is repeated in an epoch."""
    datasets = [
        load_dataset(
            load_recipe(DataRecipe, entry.recipe, beside=beside),
            root=root,
            preparation=preparation,
            task=entry.task,
            limit=entry.limit,
        )
        for entry in mixture.datasets
    ]
    balance = repeat_factors([len(d) for d in datasets], mixture.balance)
    return datasets, [r * entry.repeat for r, entry in zip(balance, mixture.datasets, strict=True)]


def alike(mixture: Mixture, datasets: Sequence[Dataset]) -> Alike | None:
    """Measure the samples of a mixture that says ``by_length``; reads annotations only.

    Raises UserError for samples that are prepared without text.
    """
    if not mixture.by_length:
        return None
    if any(d.preparation.encoder is None for d in datasets):
        raise UserError(
            f"mixture: by_length: {mixture.by_length}: a stage without a language model reads no text, so its samples "
            "have no length; take it out of the mixture, or set it to 0"
        )
    return Alike(mixture.by_length, tuple(lengths(d) for d in datasets))


def repeat_factors(lengths: Sequence[int], t: float | None) -> list[float]:
    """r = max(1, sqrt(t / f)) with f the share of each data set (X-SAM section 3.4); ``t`` None = 1 for all."""
    if t is None:
        return [1.0] * len(lengths)
    total = sum(lengths)
    return [max(1.0, math.sqrt(t * total / n)) if n else 1.0 for n in lengths]


class Plan:
    """Batches of all ranks: every global batch from one data set (X-SAM's source-grouped sampler), or ``mixed``.

    In an epoch data set d gives ``int(factor * length)`` draws: it is gone through again and again, and an epoch takes
    up where the last one stopped, so over epochs every sample is drawn equally often. The draws are shuffled, cut into
    global batches of ``batch_size * world * accumulate`` (the last one filled up with draws of the same data set),
    and the global batches of all data sets are shuffled. ``mixed``: the draws of all data sets are shuffled together
    and cut. The global batches depend on their size alone, not on how it is split over ranks and accumulation.

    ``alike`` sorts the shuffled draws by length, window by window, before they are cut; global batches are shuffled
    nonetheless. Micro-batches are stretches of a global batch, those of all ranks side by side, as without it. A
    sample that a window draws again stands behind all first draws, so that copies of it seldom share a micro-batch.
    Raises UserError for an empty data set.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        factors: Sequence[float],
        batch_size: int,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        mixed: bool = False,
        alike: Alike | None = None,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise UserError(f"mixture: data sets of {list(lengths)} samples: every one needs at least one sample")
        self.lengths = tuple(lengths)
        self.draws = tuple(max(1, int(r * n)) for r, n in zip(factors, lengths, strict=True))
        self.batch_size, self.world, self.accumulate, self.seed, self.mixed = batch_size, world, accumulate, seed, mixed
        self.alike = alike
        self.global_batch = batch_size * world * accumulate
        pools = [sum(self.draws)] if mixed else self.draws
        self.steps_per_epoch = sum(-(-draws // self.global_batch) for draws in pools)
        self._epoch = -1
        self._order = np.zeros((0, 0, 3), np.int64)

    def batch(self, step: int) -> list[list[list[Item]]]:
        """Return the items of optimiser step ``step`` (counted over epochs) as [rank][micro-batch][sample]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        items = [Item(*row) for row in self._order[place].tolist()]
        size = self.batch_size
        return [
            [items[start : start + size] for start in range(rank * size, len(items), self.world * size)]
            for rank in range(self.world)
        ]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, global_batch, 3) rows of ``Item``."""
        rng = np.random.default_rng([self.seed, epoch, 0, 2])
        pools = []
        for number, (length, draws) in enumerate(zip(self.lengths, self.draws, strict=True)):
            stream = epoch * draws + rng.permutation(draws)
            pools.append(np.stack([np.full_like(stream, number), stream % length, stream // length], axis=1))
        if self.mixed:
            pools = [rng.permutation(np.concatenate(pools))]
        size = self.global_batch
        full = [np.concatenate([rows, np.resize(rows, (-len(rows) % size, 3))]) for rows in pools]
        if self.alike is not None:
            full = [_sorted(rows, self.alike.lengths, self.alike.window * size) for rows in full]
        return rng.permutation(np.concatenate(full).reshape(-1, size, 3))


def _sorted(rows: np.ndarray, lengths: Sequence[np.ndarray], window: int) -> np.ndarray:
    """Sort every ``window`` of the (n, 3) rows: first draws of their samples by length, then second ones, and so on."""
    first = np.cumsum([0, *map(len, lengths)])
    sample, place = first[rows[:, 0]] + rows[:, 1], np.arange(len(rows))
    part = place // window
    order = np.lexsort((sample, part))
    starts = np.diff(sample[order], prepend=-1).astype(bool) | np.diff(part[order], prepend=-1).astype(bool)
    again = np.empty_like(place)
    again[order] = place - np.maximum.accumulate(np.where(starts, place, 0))
    return rows[np.lexsort((np.concatenate(lengths)[sample], again, part))]
