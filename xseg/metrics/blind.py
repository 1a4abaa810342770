"""Baselines that never see an image, scored by the same metrics: what a number is worth above guessing."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from xseg.metrics import truth
from xseg.metrics.answers import normalise, target
from xseg.types import Categories, Prediction, Sample, Segment

LEVELS = 20
"""Shares of the answers at which a common mask may be cut."""


def commonest_answers(train: Iterable[Sample]) -> dict[str, str]:
    """Return the commonest answer of each kind of question in training records; key "" = of all."""
    counts: dict[str, Counter[str]] = {"": Counter()}
    for sample in train:
        answer = normalise(target(sample))
        counts[""][answer] += 1
        if sample.kind:
            counts.setdefault(sample.kind, Counter())[answer] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items() if counter}


def blind_answer(answers: Mapping[str, str], sample: Sample) -> Prediction:
    """Answer with the commonest answer to this kind of question."""
    return Prediction(sample.key, text=answers.get(sample.kind, answers.get("", "")))


def random_object(sample: Sample, rng: np.random.Generator) -> Prediction:
    """Answer every phrase with the perfect mask of an object drawn at random; empty when there is no object."""
    objects = [i for i in sample.instances if not i.is_crowd]
    segments = []
    for phrase in sample.phrases:
        rows = [objects[int(rng.integers(len(objects)))].mask] if objects else []
        segments.append(
            Segment(truth.encode(truth.union(sample.masks, rows, truth.size_of(sample))), 0, 1.0, phrase.text)
        )
    return Prediction(sample.key, tuple(segments))


def common_mask(train: Iterable[Sample], grid: int = 64) -> np.ndarray:
    """Return the (grid, grid) bool mask of the places that the answers of phrases cover often enough.

    How often is often enough is chosen by the mean IoU over the answers themselves: the best mask of its kind.
    """
    answers = []
    for sample in train:
        for phrase in sample.phrases:
            rows = [sample.instances[i].mask for i in phrase.instances]
            answers.append(resized(truth.union(sample.masks, rows, truth.size_of(sample)), (grid, grid)))
    found = np.array(answers, bool).reshape(-1, grid, grid)
    if not found.any():
        return np.zeros((grid, grid), bool)
    share = found.mean(axis=0)
    cuts = [share >= level for level in np.linspace(0, share.max(), LEVELS + 1)[1:]]
    scores = [((found & cut).sum((1, 2)) / np.maximum((found | cut).sum((1, 2)), 1)).mean() for cut in cuts]
    return cuts[int(np.argmax(scores))]


def constant_mask(mask: np.ndarray, sample: Sample) -> Prediction:
    """Answer every phrase with the same mask, whatever the image's size."""
    placed = truth.encode(resized(mask, truth.size_of(sample)))
    return Prediction(sample.key, tuple(Segment(placed, 0, 1.0, phrase.text) for phrase in sample.phrases))


def mean_map(train: Iterable[Sample], grid: int = 64) -> np.ndarray:
    """Return the (grid, grid) int64 map of the commonest category at each place of training images; -1 = void."""
    votes: np.ndarray | None = None
    for sample in train:
        assert sample.categories is not None
        lut = np.array([-1, *(i.category for i in sample.instances)], np.int64)
        placed = lut[resized(truth.segment_map(sample), (grid, grid))]
        if votes is None:
            votes = np.zeros((len(sample.categories.names) + 1, grid, grid), np.int64)
        np.add.at(votes, (placed + 1, *np.indices(placed.shape)), 1)
    if votes is None:
        return np.full((grid, grid), -1, np.int64)
    return votes.argmax(axis=0) - 1


def constant_panoptic(category_map: np.ndarray, sample: Sample) -> Prediction:
    """Predict the same category map for every image; each category in it is one segment."""
    categories: Categories | None = sample.categories
    assert categories is not None
    semantic = resized(category_map, truth.size_of(sample))
    present = [int(c) for c in np.unique(semantic) if c >= 0]
    segments = tuple(Segment(truth.encode(semantic == c), c, 1.0, categories.names[c]) for c in present)
    id_map = np.zeros(semantic.shape, np.int32)
    for k, c in enumerate(present):
        id_map[semantic == c] = k + 1
    things = tuple(s for s in segments if categories.is_thing[s.category])
    return Prediction(sample.key, segments, panoptic=id_map, semantic=semantic, extra={"instances": things})


def named_at_random(sample: Sample, rng: np.random.Generator) -> Prediction:
    """Predict every annotated segment perfectly and name it at random: things by a thing's name, stuff by stuff's."""
    categories: Categories | None = sample.categories
    assert categories is not None
    kinds = [np.flatnonzero(np.asarray(categories.is_thing, bool) == thing) for thing in (False, True)]
    found_map = truth.segment_map(sample)
    segments: list[Segment] = []
    id_map, semantic = np.zeros(found_map.shape, np.int32), np.full(found_map.shape, -1, np.int64)
    for number, instance in enumerate(sample.instances, start=1):
        if instance.is_crowd:
            continue
        name = int(rng.choice(kinds[categories.is_thing[instance.category]]))
        mask = found_map == number
        segments.append(Segment(truth.encode(mask), name, 1.0, categories.names[name]))
        id_map[mask], semantic[mask] = len(segments), name
    things = tuple(s for s in segments if categories.is_thing[s.category])
    return Prediction(sample.key, tuple(segments), panoptic=id_map, semantic=semantic, extra={"instances": things})


def resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resize of a 2-D map to (H, W)."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, array.shape, strict=True)
    )
    return array[np.ix_(rows, columns)]
