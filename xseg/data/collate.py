"""Encoded samples -> one flat Batch. Knows no task: only queries, concepts, prompts and their places."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from xseg.tokens import IGNORE_LABEL
from xseg.types import Batch, Encoded, EncodedQuery


def collate(samples: Sequence[Encoded]) -> Batch:
    """Put samples of any mix of tasks into one batch; see ``Batch`` for every field.

    Queries with ``negatives="batch"`` list the concepts of all such queries in order of appearance, and their class
    indices move accordingly (X-SAM's rule for referring: other phrases of the micro-batch compete).
    """
    ids, mask, labels = _text(samples)
    images = [image for s in samples for image in s.images]
    first_image = _starts([len(s.images) for s in samples])
    side = images[0].geometry.canvas if images else 0
    queries = [(s, q) for s, sample in enumerate(samples) for q in sample.queries]
    concepts, classes = _concepts(samples, queries)
    query_image = [first_image[s] + q.image for s, q in queries]
    slots, per_image = _running(query_image)
    prompts = [(s, k, p) for s, sample in enumerate(samples) for k, p in enumerate(sample.prompts)]
    return Batch(
        keys=tuple(s.key for s in samples),
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        llm_pixels=_stack([i.llm for i in images], (3, 0, 0), np.float32),
        mask_pixels=_stack([i.mask for i in images], (3, 0, 0), np.float32),
        image_slot=_rows([(s, at, first_image[s] + k) for s, k, at in _places(samples, "images")], 3),
        query_image=torch.tensor(query_image, dtype=torch.int64),
        query_slot=torch.tensor(slots, dtype=torch.int64),
        seg_position=_rows([_seg(samples[s], s, q) for s, q in queries], 2),
        concept_span=_rows([(s, *span) for s, _, span in _places(samples, "spans")], 3),
        query_concepts=_padded(concepts),
        target_masks=_concatenate([q.masks for _, q in queries], (side, side)),
        target_query=torch.tensor([i for i, (_, q) in enumerate(queries) for _ in q.classes], dtype=torch.int64),
        target_class=torch.tensor([c for row in classes for c in row], dtype=torch.int64),
        prompt_mask=_stack([mask for _, _, (mask, _) in prompts], (side, side), np.uint8),
        prompt_image=torch.tensor([first_image[s] + image for s, _, (_, image) in prompts], dtype=torch.int64),
        region_position=_rows([_region(samples[s], s, k) for s, k, _ in prompts], 2),
        ignore=_ignore([q for _, q in queries], side),
        geometry=tuple(i.geometry for i in images),
        max_queries=per_image,
    )


def _text(samples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    length = max((len(s.text.input_ids) for s in samples if s.text is not None), default=0)
    ids = torch.zeros((len(samples), length), dtype=torch.int64)
    mask = torch.zeros((len(samples), length), dtype=torch.bool)
    labels = torch.full((len(samples), length), IGNORE_LABEL, dtype=torch.int64)
    for row, sample in enumerate(samples):
        if sample.text is not None:
            end = len(sample.text.input_ids)
            ids[row, :end] = torch.from_numpy(sample.text.input_ids)
            labels[row, :end] = torch.from_numpy(sample.text.labels)
            mask[row, :end] = True
    return ids, mask, labels


def _places(samples: Sequence[Encoded], field: str) -> list[tuple[int, int, Any]]:
    """(sample, ordinal, position or span) of one kind of token, over the batch."""
    return [
        (s, k, place)
        for s, sample in enumerate(samples)
        if sample.text is not None
        for k, place in enumerate(getattr(sample.text, field).tolist())
    ]


def _concepts(
    samples: Sequence[Encoded], queries: Sequence[tuple[int, EncodedQuery]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of ``concept_span`` that compete for each query, and its targets' class indices among them."""
    first = _starts([0 if s.text is None else len(s.text.spans) for s in samples])
    own = [[first[s] + c for c in q.concepts] for s, q in queries]
    shared = [rows for rows, (_, q) in zip(own, queries, strict=True) if q.negatives == "batch"]
    together = list(dict.fromkeys(row for rows in shared for row in rows))
    place = {row: i for i, row in enumerate(together)}
    listed, classes = [], []
    for rows, (_, q) in zip(own, queries, strict=True):
        joins = q.negatives == "batch"
        listed.append(together if joins else rows)
        classes.append([place[rows[c]] if joins else c for c in q.classes.tolist()])
    return listed, classes


def _seg(sample: Encoded, number: int, query: EncodedQuery) -> tuple[int, int]:
    if query.seg is None or sample.text is None or query.seg >= len(sample.text.segs):
        return (-1, -1)
    return (number, int(sample.text.segs[query.seg]))


def _region(sample: Encoded, number: int, ordinal: int) -> tuple[int, int]:
    assert sample.text is not None, f"{sample.key}: a prompt needs a text with its <region>"
    return (number, int(sample.text.regions[ordinal]))


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()][: len(lengths)]


def _running(groups: Sequence[int]) -> tuple[list[int], int]:
    """The running number of each entry within its group, and the size of the largest group."""
    count: dict[int, int] = {}
    out = []
    for group in groups:
        out.append(count.get(group, 0))
        count[group] = out[-1] + 1
    return out, max(count.values(), default=0)


def _rows(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows), default=0)), -1, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def _stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays) if arrays else np.zeros((0, *shape), dtype))


def _concatenate(arrays: Sequence[np.ndarray], shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros((0, *shape), np.uint8), *arrays]))


def _ignore(queries: Sequence[EncodedQuery], side: int) -> torch.Tensor | None:
    if all(q.ignore is None for q in queries):
        return None
    nothing = np.zeros((side, side), np.uint8)
    return torch.from_numpy(np.stack([nothing if q.ignore is None else q.ignore for q in queries]))
