"""About how long a sample's conversation is, from its annotation alone: what ``by_length`` of a mixture sorts by."""

from collections.abc import Sequence

import numpy as np

from xseg.data.dataset import Dataset
from xseg.tokens import IMAGE

TURN = 17
"""Characters that the marks of a chat template around a turn stand for: four tokens."""
PICTURE = 7000
"""Characters that an image stands for: the 1753 rows of X-SAM. With any other number of rows, too, it keeps
conversations without an image apart."""
LOOKED = 16
"""Samples from which it is learnt what a task adds to their texts."""


def lengths(dataset: Dataset) -> np.ndarray:
    """(N,) int64 of about the characters that the language model reads of each sample, a token being four of them.

    A source tells the ``texts`` of its samples, and a few conversations what the task adds to each of them. Where a
    source tells none, because the task's wording is nearly all there is (a list of categories, drawn prompts), all
    samples are equally long. No image is decoded.
    """
    if not len(dataset):
        return np.zeros(0, np.int64)
    looked = range(0, len(dataset), -(-len(dataset) // LOOKED))
    whole = [_characters([turn.text for turn in dataset.format(i).turns], TURN) for i in looked]
    texts = getattr(dataset.source, "texts", None)
    if texts is None:
        return np.full(len(dataset), np.mean(whole), np.int64)
    count = sum(text != IMAGE for i in looked for text in texts(i))
    added = max(0.0, (sum(whole) - sum(_characters(texts(i)) for i in looked)) / max(1, count))
    return np.array([_characters(texts(i), added) for i in range(len(dataset))], np.int64)


def _characters(texts: Sequence[str], added: float = 0.0) -> float:
    return sum(len(text) + added * (text != IMAGE) + PICTURE * text.count(IMAGE) for text in texts)
