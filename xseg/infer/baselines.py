"""What an evaluation scores without looking at any image, for the tasks that have such a baseline."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xseg.data.dataset import Dataset
from xseg.geometry.masks import decode, encode, row_rle
from xseg.metrics import blind
from xseg.tasks.interactive_seg import fixed, prompt_of
from xseg.tasks.phrasing import span
from xseg.types import Instance, Masks, Prediction, Sample, Segment

Blind = Callable[[Sample], Prediction]


def blind_guess(dataset: Dataset) -> tuple[str, Blind] | None:
    """Return (protocol, guess) for a data set, or None for a task without a baseline.

    What the guess knows about answers and places is counted on the evaluated samples themselves: the strongest blind
    guess of its kind, so that beating it means something.
    """
    make = {
        "conversation": _answers,
        "refer_seg": _objects,
        "reason_seg": _objects,
        "generic_seg": _map,
        "open_vocab_seg": _named,
        "vgd_seg": _shown,
        "interactive_seg": _prompts,
        "gcg_seg": _caption,
    }.get(dataset.task.name)
    return make(dataset) if make else None


def _answers(dataset: Dataset) -> tuple[str, Blind]:
    answers = blind.commonest_answers(samples(dataset))
    text = "blind: the commonest answer to each kind of question, counted on this very set"
    return text, lambda sample: blind.blind_answer(answers, sample)


def _objects(dataset: Dataset) -> tuple[str, Blind]:
    pool: dict[int | str, dict[int, Any]] = {}
    for sample in samples(dataset):  # a sample of one sentence knows that sentence's objects only
        objects = pool.setdefault(sample.image_id, {})
        for instance in sample.instances:
            if not instance.is_crowd and sample.masks is not None:
                objects[instance.id] = row_rle(sample.masks, instance.mask)
    if max(map(len, pool.values()), default=0) < 2:
        return _place(dataset)  # the one object that such a set knows of an image is the answer itself
    rng = np.random.default_rng(0)

    def guess(sample: Sample) -> Prediction:
        rles = tuple(pool[sample.image_id].values())
        instances = tuple(Instance(row, -1) for row in range(len(rles)))
        pooled = dataclasses.replace(sample, masks=Masks(sample.size, rles), instances=instances)
        return blind.random_object(pooled, rng)

    return "blind: the perfect mask of a random object of the image, of all that this set names", guess


def _place(dataset: Dataset) -> tuple[str, Blind]:
    mask = blind.common_mask(samples(dataset))
    text = "blind: one constant mask, where this very set's answers lie most often, cut where it scores best"
    return text, lambda sample: blind.constant_mask(mask, sample)


def _prompts(dataset: Dataset) -> tuple[str, Blind]:
    def guess(sample: Sample) -> Prediction:
        shown = [
            (p.kind, prompt_of(sample, p.instances[0], p.kind, fixed(sample, p.instances[0]))) for p in sample.phrases
        ]
        return Prediction(sample.key, tuple(Segment(mask, 0, 1.0, kind) for kind, mask in shown))

    return "blind: the drawn prompt itself as the object's mask", guess


def _shown(dataset: Dataset) -> tuple[str, Blind]:
    place = {sample.key: index for index, sample in enumerate(samples(dataset))}

    def guess(sample: Sample) -> Prediction:
        asked = dataset.task.listed(sample)
        shown = dataset.format(place[sample.key]).prompts
        segments = []
        for category, prompt in zip(asked, shown, strict=True):
            mask = blind.resized(decode(prompt.mask), sample.size)  # another picture may have another size
            segments.append(Segment(encode(mask), category, 1.0))
        return Prediction(sample.key, extra={"instances": tuple(segments)})

    return "blind: the drawn prompts themselves, each as an object of its kind at its own place", guess


def _caption(dataset: Dataset) -> tuple[str, Blind]:
    counts: Counter[str] = Counter()
    numbers = []
    for sample in samples(dataset):
        counts.update(phrase.text for phrase in sample.phrases)
        numbers.append(len(sample.phrases))
    phrases = [phrase for phrase, _ in counts.most_common(max(1, round(float(np.median(numbers)))))]
    rng = np.random.default_rng(0)

    def guess(sample: Sample) -> Prediction:
        masks, rows = sample.masks, [instance.mask for instance in sample.instances]
        segments = []
        for k, phrase in enumerate(phrases if rows else ()):
            assert masks is not None
            segments.append(Segment(row_rle(masks, rows[int(rng.integers(len(rows)))]), k, 1.0, phrase))
        return Prediction(sample.key, tuple(segments), text=f"{', '.join(map(span, phrases))}.")

    text = "blind: the commonest phrases of this very set, each with the perfect mask of a random object of the image"
    return text, guess


def _named(dataset: Dataset) -> tuple[str, Blind]:
    rng = np.random.default_rng(0)
    text = "blind: perfect masks of everything, things and stuff named at random"
    return text, lambda sample: blind.named_at_random(sample, rng)


def _map(dataset: Dataset) -> tuple[str, Blind]:
    category_map = blind.mean_map(samples(dataset))
    text = "blind: one constant map, the commonest category of each place in this very set"
    return text, lambda sample: blind.constant_panoptic(category_map, sample)


def samples(dataset: Dataset) -> Iterator[Sample]:
    """All annotated samples of a data set, in order; no image is decoded."""
    return (dataset.sample(i) for i in range(len(dataset)))
