"""The wording of questions and answers: drawn at random in training, the first of each list in evaluation.

``{names}`` is the list of category phrases, ``{phrase}`` one phrase, both with their ``<p>`` markers.
"""

from collections.abc import Sequence

import numpy as np

from xseg.tokens import P_CLOSE, P_OPEN, SEG

CATEGORIES = (
    "Segment the image by these categories: {names}.",
    "Please divide the image into regions of these categories: {names}.",
    "Which pixels belong to which category? Choose from {names}.",
    "Here is a list of categories: {names}. Segment everything in the image that belongs to one of them.",
    "Find all the things and areas of these kinds and outline them: {names}.",
    "Can you give the segmentation of this image for the categories {names}?",
    "Label each region of the picture with one of {names}.",
    "Mark every object and background area named in this list: {names}.",
)
PHRASE = (
    "Please segment {phrase} in the image.",
    "Can you segment {phrase}?",
    "Where is {phrase}? Answer with a mask.",
    "Outline {phrase} in this picture.",
    "I need the mask of {phrase}.",
    "Show me {phrase} in the image by a segmentation mask.",
    "Which pixels belong to {phrase}?",
    "Find {phrase} and mark its region.",
)
ANSWER = (
    f"Sure, the segmentation mask is {SEG}.",
    f"It is {SEG}.",
    f"Sure, it is {SEG}.",
    f"The segmentation result is {SEG}.",
    f"{SEG}.",
    f"Sure, {SEG}.",
    f"Here is the mask: {SEG}.",
    f"The mask you asked for is {SEG}.",
)


def pick(variants: Sequence[str], rng: np.random.Generator, train: bool) -> str:
    """Return a random variant in training and the first one in evaluation, so that scores depend on no seed."""
    return variants[int(rng.integers(len(variants)))] if train else variants[0]


def span(text: str) -> str:
    """Return the text between the span markers."""
    return f"{P_OPEN}{text}{P_CLOSE}"
