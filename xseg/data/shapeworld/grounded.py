"""Captions whose words are tied to masks (GLaMM's grounded conversation): each span names things or a ground."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from xseg.data.shapeworld.language import in_words, looks
from xseg.data.shapeworld.world import Scene
from xseg.geometry.masks import encode, to_json


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a caption, and what they name."""

    start: int
    end: int
    masks: tuple[np.ndarray, ...]
    """(side, side) bool of the visible pixels, one per thing ("two red bars" has two), or that of a ground."""


def grounded(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Span]]:
    """Return a caption that names everything, as ``caption`` words it, and its spans from left to right."""
    parts = looks(scene, rng)
    text = in_words(scene, parts)
    named = [(words, tuple(scene.visible(i) for i in things)) for words, things in parts]
    named += [(name, (scene.owner == band + 1,)) for band, name in enumerate(scene.ground.names)]
    spans: list[Span] = []
    for words, masks in named:
        # nothing but a comma or an "and" stands between two of them, so the first place found is the right one
        start = text.index(words, spans[-1].end if spans else 0)
        spans.append(Span(start, start + len(words), masks))
    return text, spans


def record(file: str, image: int, text: str, spans: list[Span]) -> dict[str, Any]:
    """The record of GranDf's layout: groundings by phrase, with their places in the caption and their masks."""
    groundings = {
        text[span.start : span.end]: {
            "token_positives": [span.start, span.end],
            "rle_masks": [to_json(encode(mask)) for mask in span.masks],
        }
        for span in spans
    }
    return {"image_id": image, "file_name": file, "caption": text, "groundings": groundings}
