"""Greedy answers with a cache, and the masks that the answer asks for."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from xseg.errors import UserError
from xseg.models import llm
from xseg.models.features import ImageFeatures
from xseg.models.splice import Layout
from xseg.tokens import IGNORE_LABEL
from xseg.types import Batch, ModelOutput

if TYPE_CHECKING:
    from xseg.models.xseg import XSegModel


@dataclass(frozen=True)
class Generated:
    """Answers, and masks where they were asked for."""

    batch: Batch
    """The batch with the answers behind the prompts; its queries are those that could be decoded."""
    sequences: list[list[int]]
    """New ids of each sample, up to and with the stop id."""
    output: ModelOutput | None
    """Masks of ``batch``'s queries; None when there is none."""
    queries: list[list[int]]
    """Rows of ``output``'s query axis that belong to each sample; empty = nothing to segment, or the number of
    ``<SEG>`` written does not fit the number of questions."""
    hidden: Tensor
    """(B, rows, D) states of prompt and answer as ``batch`` lays them out; what was not fed is zero."""


@dataclass
class Answers:
    """What the loop collects: B samples, k steps."""

    ids: Tensor
    """(B, k) int64, 0 after a sample's end."""
    lengths: list[int]
    states: Tensor
    """(B, k, D) state at each new id; the last one is zero when it was not needed."""


@torch.no_grad()
def generate(
    model: "XSegModel",
    batch: Batch,
    limits: tuple[int, tuple[int, ...]],
    features: ImageFeatures | None,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
) -> Generated:
    """Answer each prompt of ``batch`` greedily, then decode.

    ``limits``: most new tokens, and ids that end an answer. ``processors`` change (ids so far, logits) as those of
    transformers do. Spans written in an answer replace the concepts of that sample's queries. A sample without
    queries gets one as soon as it writes one ``<SEG>`` beside an image. Raises UserError for a batch without text.
    """
    if batch.input_ids.shape[1] == 0:
        raise UserError("generation needs a prompt: this batch has no text")
    if features is None:
        features = model.encode_images(batch.llm_pixels, batch.mask_pixels)
    layout, rows = model.embed(batch, features)
    cache = DynamicCache(config=model.config.text_config)
    prompt = llm.hidden_states(model.llm, rows, mask=layout.mask, cache=cache)
    answers = _loop(model, layout, prompt, cache, limits, processors)
    full, queries = complete(batch, answers, model.config)
    whole = model.layout(full, features)
    hidden = _join(layout, whole, prompt, answers.states)
    output = model.segment(full, features, whole, hidden) if full.max_queries and features.maps is not None else None
    sequences = [answers.ids[b, :n].tolist() for b, n in enumerate(answers.lengths)]
    return Generated(full, sequences, output, queries, hidden)


def _loop(
    model: "XSegModel",
    layout: Layout,
    prompt: Tensor,
    cache: DynamicCache,
    limits: tuple[int, tuple[int, ...]],
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
) -> Answers:
    most, stop = limits
    samples = torch.arange(len(prompt), device=prompt.device)
    last = prompt[samples, (layout.total - 1).clamp(min=0)]
    stops = torch.tensor(stop, dtype=torch.long, device=prompt.device)
    markers = torch.tensor(
        [model.config.seg_token_id, model.config.p_close_token_id], dtype=torch.long, device=prompt.device
    )
    ids, states, mask = samples.new_zeros(len(prompt), 0), [], layout.mask
    done, lengths = torch.zeros_like(samples, dtype=torch.bool), torch.zeros_like(samples)
    for step in range(most):
        logits = model.llm.get_output_embeddings()(last).float()
        for process in processors:
            logits = process(ids, logits)
        token = logits.argmax(-1).masked_fill(done, 0)
        ids = torch.cat((ids, token[:, None]), 1)
        lengths += ~done
        # The state of a token exists once it is fed; the very last one is fed only if something reads its state.
        read = torch.isin(token, markers) & ~done
        done = done | torch.isin(token, stops)
        if (bool(done.all()) or step + 1 == most) and not bool(read.any()):
            states.append(torch.zeros_like(last))
            break
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        row = model.llm.get_input_embeddings()(token[:, None])
        places = (layout.total + step)[:, None]
        last = llm.hidden_states(model.llm, row, mask=mask, places=places, cache=cache)[:, 0]
        states.append(last)
        if bool(done.all()):
            break
    states_of = torch.stack(states, 1) if states else prompt[:, :0]
    return Answers(ids, lengths.tolist(), states_of)


def complete(batch: Batch, answers: Answers, config: object) -> tuple[Batch, list[list[int]]]:
    """Put the answers behind the prompts and resolve the queries; also the rows of the queries of each sample."""
    prompts = [batch.input_ids[b][batch.attention_mask[b]] for b in range(len(batch.keys))]
    texts = [torch.cat((p, answers.ids[b, : answers.lengths[b]])) for b, p in enumerate(prompts)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(t) for t in texts], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    spans, questions = batch.concept_span.tolist(), _questions(batch)
    made: list[tuple[int, int, list[int], list[int]]] = []
    for b, text in enumerate(texts):
        new, at = text[len(prompts[b]) :].cpu().numpy(), len(prompts[b])
        segs = [at + int(i) for i in np.flatnonzero(new == config.seg_token_id)]  # type: ignore[attr-defined]
        found = pairs(new, config.p_open_token_id, config.p_close_token_id)  # type: ignore[attr-defined]
        written = list(range(len(spans), len(spans) + len(found)))
        spans += [[b, at + s, at + e] for s, e in found]
        made += _resolve(b, questions[b], segs, written)
    width = max((len(q[3]) for q in made), default=0)
    slots = [sum(other[1] == q[1] for other in made[:i]) for i, q in enumerate(made)]

    def long(values: list, *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=ids.device).reshape(len(values), *shape)

    full = dataclasses.replace(
        batch,
        input_ids=ids,
        attention_mask=mask,
        labels=torch.full_like(ids, IGNORE_LABEL),
        query_image=long([q[1] for q in made]),
        query_slot=long(slots),
        seg_position=long([q[2] for q in made], 2),
        concept_span=long(spans, 3),
        query_concepts=long([q[3] + [-1] * (width - len(q[3])) for q in made], width),
        max_queries=max(slots, default=-1) + 1,
    )
    return full, [[i for i, q in enumerate(made) if q[0] == b] for b in range(len(texts))]


def _questions(batch: Batch) -> list[list[tuple[int, list[int], list[int]]]]:
    """Per sample its queries: image, ``<SEG>`` position, concepts. Without any, one open query on its first image."""
    owner: dict[int, int] = {}
    out: list[list[tuple[int, list[int], list[int]]]] = [[] for _ in batch.keys]
    for sample, _, image in batch.image_slot.tolist():
        owner.setdefault(image, sample)
    rows = zip(batch.query_image.tolist(), batch.seg_position.tolist(), batch.query_concepts.tolist(), strict=True)
    for image, seg, concepts in rows:
        sample = seg[0] if seg[0] >= 0 else owner.get(image)
        if sample is not None:
            out[sample].append((image, seg, [c for c in concepts if c >= 0]))
    for image, sample in sorted(owner.items(), reverse=True):
        if not any(entry[1][0] != -2 for entry in out[sample]):
            out[sample] = [(image, [-2, -2], [])]
    return out


def _resolve(
    sample: int, questions: list[tuple[int, list[int], list[int]]], segs: list[int], written: list[int]
) -> list[tuple[int, int, list[int], list[int]]]:
    """(sample, image, ``<SEG>`` position, concepts) of the queries that can be decoded."""
    opened = [q for q in questions if q[1][0] < 0]
    places = iter(segs)
    out = []
    for image, seg, concepts in questions:
        if seg[0] >= 0:
            out.append((sample, image, seg, concepts))
        elif len(segs) == len(opened):
            out.append((sample, image, [sample, next(places)], written or concepts))
    return out


def pairs(ids: np.ndarray, opening: int, closing: int) -> list[tuple[int, int]]:
    """Half-open spans of the markers that pair up; a model may write others, which are passed over."""
    out, start = [], None
    for place, token in enumerate(ids.tolist()):
        if token == opening:
            start = place
        elif token == closing and start is not None:
            out.append((start, place + 1))
            start = None
    return out


def _join(before: Layout, after: Layout, prompt: Tensor, states: Tensor) -> Tensor:
    """States of prompt and answer, one after the other without the prompt's padding."""
    row = torch.arange(after.mask.shape[1], device=prompt.device)
    total = before.total[:, None]
    place = torch.where(row < total, row, before.mask.shape[1] + row - total)
    joined = torch.cat((prompt, states), 1)
    place = place.clamp(max=joined.shape[1] - 1)
    return joined.gather(1, place[..., None].expand(-1, -1, joined.shape[2]))
