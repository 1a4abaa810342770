"""What an evaluation scores without looking at any image, for the tasks that have such a baseline."""

from collections.abc import Callable, Iterator

import numpy as np

from xseg.data.dataset import Dataset
from xseg.metrics import blind
from xseg.types import Prediction, Sample

Blind = Callable[[Sample], Prediction]


def blind_guess(dataset: Dataset) -> tuple[str, Blind] | None:
    """Return (protocol, guess) for a data set, or None for a task without a baseline.

    What the guess knows about answers and places is counted on the evaluated samples themselves: the strongest blind
    guess of its kind, so that beating it means something.
    """
    make = {"conversation": _answers, "refer_seg": _objects, "generic_seg": _map}.get(dataset.task.name)
    return make(dataset) if make else None


def _answers(dataset: Dataset) -> tuple[str, Blind]:
    answers = blind.commonest_answers(samples(dataset))
    text = "blind: the commonest answer to each kind of question, counted on this very set"
    return text, lambda sample: blind.blind_answer(answers, sample)


def _objects(dataset: Dataset) -> tuple[str, Blind]:
    rng = np.random.default_rng(0)
    return "blind: the perfect mask of a random object of the image", lambda sample: blind.random_object(sample, rng)


def _map(dataset: Dataset) -> tuple[str, Blind]:
    category_map = blind.mean_map(samples(dataset))
    text = "blind: one constant map, the commonest category of each place in this very set"
    return text, lambda sample: blind.constant_panoptic(category_map, sample)


def samples(dataset: Dataset) -> Iterator[Sample]:
    """All annotated samples of a data set, in order; no image is decoded."""
    return (dataset.sample(i) for i in range(len(dataset)))
