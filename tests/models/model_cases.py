"""A model of a few thousand parameters and batches of every kind for it."""

import dataclasses

import torch
from torch import Tensor

from xseg.models.build import build_model
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
from xseg.types import Batch, ViewGeometry

SEG, OPEN, CLOSE, STOP = 61, 62, 63, 2
IMAGE, REGION = -200, -300
CANVAS, VIEW = 32, 16


def config(
    *, parts: tuple[str, ...] = ("segmentor", "siglip", "llm"), language: str = "phi3",
    llm_sees: list[str] | None = None, llm_rows: str = "concatenated",
    llm_normed_rows: bool = False, region_encoder: str = "sam", **segmentor: object,
) -> XSegConfig:  # fmt: skip
    """Grid 4x4 of patch 8, residual stem, FPN unless told otherwise."""
    sam = {
        "stem": "residual", "image_size": CANVAS, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 2, "mlp_dim": 32, "window_size": 3, "global_attn_indexes": [1, 3], "output_channels": 8,
    }  # fmt: skip
    siglip = {"image_size": VIEW, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    text = {
        "model_type": language, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": STOP,
        "tie_word_embeddings": language == "llama",
    }  # fmt: skip
    decoder = {
        "width": 32, "connector_width": 16, "pixel_decoder": "fpn", "pixel_layers": 1, "pixel_ffn": 16,
        "num_queries": 5, "decoder_layers": 3, "heads": 2, "ffn": 16, **segmentor,
    }  # fmt: skip
    return XSegConfig(
        sam_config=sam if {"sam", "segmentor"} & set(parts) else None,
        siglip_config={**siglip, "num_attention_heads": 2} if "siglip" in parts else None,
        text_config=text if "llm" in parts else None,
        segmentor_config=decoder if "segmentor" in parts else None,
        llm_sees=llm_sees,
        llm_rows=llm_rows,
        llm_normed_rows=llm_normed_rows,
        region_encoder=region_encoder,
        seg_token_id=SEG,
        p_open_token_id=OPEN,
        p_close_token_id=CLOSE,
    )


def model(**options: object) -> XSegModel:
    """Random weights, the same every time; vectors that start at 0 or 1 are moved away from there."""
    torch.manual_seed(0)
    made = build_model(config(**options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def batch(
    texts: list[list[int]], queries: list[tuple[int, int, list[int]]] = (), *, image_of: list[int] | None = None,
    images: int | None = None, seed: int = 0,
) -> Batch:  # fmt: skip
    """Samples as ids. ``queries``: (image, row of the batch's ``<SEG>`` tokens or -1, concept rows).

    Image k belongs to the k-th ``<image>``; answers (everything behind id 50, which says "answer") are supervised.
    """
    length = max((len(t) for t in texts), default=0)
    ids = torch.tensor([t + [0] * (length - len(t)) for t in texts], dtype=torch.long).reshape(len(texts), length)
    mask = torch.tensor([[True] * len(t) + [False] * (length - len(t)) for t in texts], dtype=torch.bool).reshape(
        len(texts), length
    )
    slots = [[b, t] for b, t in (ids == IMAGE).nonzero().tolist()]
    order = image_of or list(range(len(slots)))
    count = images if images is not None else len(set(order))
    segs = (ids == SEG).nonzero().tolist()
    opens, closes = (ids == OPEN).nonzero().tolist(), (ids == CLOSE).nonzero().tolist()
    spans = [[o[0], o[1], c[1] + 1] for o, c in zip(opens, closes, strict=True)]
    regions = (ids == REGION).nonzero()
    g = torch.Generator().manual_seed(seed)
    width = max((len(q[2]) for q in queries), default=0)
    running = [sum(other[0] == q[0] for other in queries[:i]) for i, q in enumerate(queries)]
    behind = (ids == 50).cumsum(1).bool() & mask & (ids != 50)
    prompts = torch.zeros(len(regions), CANVAS, CANVAS, dtype=torch.uint8)
    for k in range(len(regions)):
        prompts[k, 4 * k : 4 * k + 9, 3:17] = 1

    def long(rows: list, *shape: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), *shape)

    return Batch(
        keys=tuple(f"case/{b}" for b in range(len(texts))),
        input_ids=ids,
        attention_mask=mask,
        labels=torch.where(behind, ids, -100),
        llm_pixels=torch.randn(count, 3, VIEW, VIEW, generator=g),
        mask_pixels=torch.randn(count, 3, CANVAS, CANVAS, generator=g),
        image_slot=long([[*s, k] for s, k in zip(slots, order, strict=True)], 3),
        query_image=long([q[0] for q in queries]),
        query_slot=long(running),
        seg_position=long([segs[q[1]] if q[1] >= 0 else [-1, -1] for q in queries], 2),
        concept_span=long(spans, 3),
        query_concepts=long([q[2] + [-1] * (width - len(q[2])) for q in queries], width),
        target_masks=torch.zeros(0, CANVAS, CANVAS, dtype=torch.uint8),
        target_query=long([]),
        target_class=long([]),
        prompt_mask=prompts,
        prompt_image=torch.zeros(len(regions), dtype=torch.long),
        region_position=regions,
        ignore=None,
        geometry=(ViewGeometry((CANVAS, CANVAS), (CANVAS, CANVAS), CANVAS),) * count,
        max_queries=max(running, default=-1) + 1,
    )


TALK = [1, IMAGE, 10, 11, 50, 12, 13, STOP]
CATEGORIES = [1, IMAGE, OPEN, 20, CLOSE, OPEN, 21, 22, CLOSE, 50, 30, SEG, STOP]
TWO_TURNS = [1, IMAGE, OPEN, 23, 24, CLOSE, 50, SEG, STOP, OPEN, 25, CLOSE, 50, 31, SEG, STOP]
WORDS = [1, 10, 11, 50, 12, STOP]
POINTED = [1, IMAGE, 10, OPEN, REGION, CLOSE, OPEN, REGION, CLOSE, 50, SEG, STOP]


def kinds() -> dict[str, Batch]:
    """One batch of every kind that training meets."""
    return {
        "categories": batch([CATEGORIES], [(0, 0, [0, 1])]),
        "phrases": batch([TWO_TURNS, CATEGORIES], [(0, 0, [0]), (0, 1, [1]), (1, 2, [2, 3])]),
        "conversation": batch([TALK, TALK]),
        "words": batch([WORDS]),
        "mixed": batch([TALK, CATEGORIES, WORDS], [(1, 0, [0, 1])]),
        "regions": batch([POINTED], [(0, 0, [0, 1])]),
        "click": batch([[]], [(0, -1, [])], images=1),
        "no labels": batch([[1, IMAGE, 10]]),
        "same picture twice": batch([TALK, CATEGORIES], [(0, 0, [0, 1])], image_of=[0, 0]),
    }


def alone(whole: Batch, query: int) -> Batch:
    """The batch with one of its queries only."""
    own = slice(query, query + 1)
    return dataclasses.replace(
        whole,
        query_image=whole.query_image[own],
        query_slot=torch.zeros(1, dtype=torch.long),
        seg_position=whole.seg_position[own],
        query_concepts=whole.query_concepts[own],
        max_queries=1,
    )
