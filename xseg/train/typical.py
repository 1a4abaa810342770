"""A batch like those of a stage whose data are not at hand: sizes alone, for plans and for benchmarks."""

import numpy as np

from xseg.data.collate import collate
from xseg.geometry.views import ViewSizes
from xseg.models.configuration import XSegConfig
from xseg.tokens import IGNORE_LABEL, SENTINELS
from xseg.types import Batch, Encoded, EncodedQuery, EncodedText, ImageViews, ViewGeometry

WORDS = 300
"""Text tokens of a sample, the picture not counted."""
ANSWERED = 0.25
"""Share of them that is supervised."""
CONCEPTS = 15
"""Concepts of a query, one target mask each."""
SPAN = 3
"""Tokens of a concept, markers inside."""


def typical_batch(config: XSegConfig, sizes: ViewSizes, samples: int) -> Batch:
    """``samples`` samples of one picture each; where masks are answered, one query with ``CONCEPTS`` masks."""
    return collate([_sample(config, sizes, f"typical/{number}") for number in range(samples)])


def _sample(config: XSegConfig, sizes: ViewSizes, key: str) -> Encoded:
    side = sizes.canvas
    views = ImageViews(
        np.zeros((3, sizes.llm, sizes.llm), np.float32),
        np.zeros((3, side, side), np.float32),
        ViewGeometry((side, side), (side, side), side),
    )
    decoder, text = config.segmentor_config, config.text_config is not None
    queries: tuple[EncodedQuery, ...] = ()
    if decoder is not None:
        labels = decoder.head == "labels"
        many = min(CONCEPTS, decoder.num_labels) if labels else CONCEPTS
        concepts = () if labels else tuple(range(CONCEPTS))
        masks = np.ones((many, side, side), np.uint8)
        queries = (EncodedQuery(0 if text else None, concepts, 0, masks, np.arange(many)),)
    return Encoded(key, _text(config, bool(queries)) if text else None, (views,), queries)


def _text(config: XSegConfig, masks: bool) -> EncodedText:
    """A picture, the concepts, and an answer that ends with ``<SEG>``."""
    ids = np.ones(WORDS + 1, np.int64)
    ids[0] = SENTINELS["<image>"]
    spans = np.array([[1 + SPAN * k, 1 + SPAN * (k + 1)] for k in range(CONCEPTS * masks)]).reshape(-1, 2)
    if masks:
        ids[-1] = config.seg_token_id
    labels = np.full_like(ids, IGNORE_LABEL)
    answer = int(WORDS * ANSWERED)
    labels[-answer:] = ids[-answer:]
    segs, nothing = np.array([WORDS] if masks else [], np.int64), np.zeros(0, np.int64)
    return EncodedText(ids, labels, spans, segs, np.zeros(1, np.int64), nothing)
