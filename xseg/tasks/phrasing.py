"""The wording of questions and answers: drawn at random in training, the first of each list in evaluation.

``{names}`` is the list of category phrases or prompts, ``{phrase}`` one of them, all with their ``<p>`` markers.
"""

import re
from collections.abc import Sequence

import numpy as np

from xseg.tokens import P_CLOSE, P_OPEN, SEG, SPECIAL_TOKENS

SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))

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
QUESTION = (
    "{phrase} Answer with a segmentation mask.",
    "{phrase} Please show it by a mask.",
    "{phrase} Mark the region in the image.",
    "{phrase} Segment what is meant.",
    "{phrase} Give the mask of it.",
    "{phrase} Outline it in the picture, please.",
)
"""A question in whole sentences stands first, the instruction behind it."""
EXPLAIN = (
    "{phrase} Explain why, then give the segmentation mask.",
    "{phrase} Tell me the reason and show it by a mask.",
    "{phrase} Segment it and say what makes you think so.",
    "{phrase} Give your reasons first and the mask after them.",
    "{phrase} Please explain your choice before you mark it.",
)
CAPTION = (
    "Describe the image and give the mask of everything you name.",
    "Write a caption of this picture in which each thing has its mask.",
    "What is in the image? Mark every part of your answer that can be seen.",
    "Please give a short description with segmentation masks for its phrases.",
    "Tell me about this image, and ground your words by masks.",
    "Give a grounded description of the picture.",
)
GROUNDED = (
    f"The masks are {SEG}.",
    f"Here are the masks: {SEG}.",
    f"They are marked by {SEG}.",
    f"The segmentation of these is {SEG}.",
    f"{SEG}.",
)
"""Stands behind a grounded caption."""
PROMPT = (
    "Please segment the object marked by {phrase}.",
    "Which object is meant by {phrase}? Give its mask.",
    "Outline the one thing at {phrase}.",
    "Give me the mask of the object under {phrase}.",
    "Segment what {phrase} points at.",
    "Mark the whole object of which {phrase} shows a part.",
)
PROMPTS = (
    "Please segment all objects of the kinds marked by {names}.",
    "Find everything that is like one of these: {names}.",
    "Here are examples: {names}. Segment each object of the same kind.",
    "Which objects belong to the kinds of {names}? Give their masks.",
    "Outline every object that looks like one of {names}.",
    "Mark all things of the same category as {names}.",
)


def pick(variants: Sequence[str], rng: np.random.Generator, train: bool) -> str:
    """Return a random variant in training and the first one in evaluation, so that scores depend on no seed."""
    return variants[int(rng.integers(len(variants)))] if train else variants[0]


def spoken(explanation: str) -> str:
    """An explanation as an answer may hold it: one of a release may have markers, but an answer has one ``<SEG>``."""
    return SPECIAL.sub("", explanation).strip()


def span(text: str) -> str:
    """Return the text between the span markers."""
    return f"{P_OPEN}{text}{P_CLOSE}"
