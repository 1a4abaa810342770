"""What an evaluation scores without looking at any image, for the tasks that have such a baseline."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xseg.data.dataset import Dataset
from xseg.geometry.masks import row_rle
from xseg.metrics import blind
from xseg.metrics.answers import target
from xseg.tasks.interactive_seg import fixed, prompt_of
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
        "open_vocab_seg": _map,
        "vgd_seg": _map,
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
    rng = np.random.default_rng(0)

    def guess(sample: Sample) -> Prediction:
        rles = tuple(pool[sample.image_id].values())
        instances = tuple(Instance(row, -1) for row in range(len(rles)))
        pooled = dataclasses.replace(sample, masks=Masks(sample.size, rles), instances=instances)
        return blind.random_object(pooled, rng)

    return "blind: the perfect mask of a random object of the image, of all that this set names", guess


def _prompts(dataset: Dataset) -> tuple[str, Blind]:
    def guess(sample: Sample) -> Prediction:
        shown = [
            (p.kind, prompt_of(sample, p.instances[0], p.kind, fixed(sample, p.instances[0]))) for p in sample.phrases
        ]
        return Prediction(sample.key, tuple(Segment(mask, 0, 1.0, kind) for kind, mask in shown))

    return "blind: the drawn prompt itself as the object's mask", guess


def _caption(dataset: Dataset) -> tuple[str, Blind]:
    commonest = Counter(target(sample) for sample in samples(dataset)).most_common(1)[0][0]
    text = "blind: the commonest caption of this very set, without masks"
    return text, lambda sample: Prediction(sample.key, text=commonest)


def _map(dataset: Dataset) -> tuple[str, Blind]:
    category_map = blind.mean_map(samples(dataset))
    text = "blind: one constant map, the commonest category of each place in this very set"
    return text, lambda sample: blind.constant_panoptic(category_map, sample)


def samples(dataset: Dataset) -> Iterator[Sample]:
    """All annotated samples of a data set, in order; no image is decoded."""
    return (dataset.sample(i) for i in range(len(dataset)))
