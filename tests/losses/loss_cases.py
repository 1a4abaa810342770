"""Small batches and outputs for the loss tests, built without a model."""

from typing import Any

import torch
from torch import Tensor

from xseg.types import Batch, ModelOutput


def make_batch(masks: list[Tensor], classes: list[Tensor], **fields: Any) -> Batch:
    """One image and one query per list entry; (m, S, S) uint8 masks and (m,) classes each."""
    queries = len(masks)
    side = masks[0].shape[-1] if masks else 8
    long = torch.zeros(0, dtype=torch.long)
    values = {
        "keys": tuple(f"case/{i}" for i in range(max(1, queries))),
        "input_ids": torch.zeros(max(1, queries), 0, dtype=torch.long),
        "attention_mask": torch.zeros(max(1, queries), 0, dtype=torch.bool),
        "labels": torch.zeros(max(1, queries), 0, dtype=torch.long),
        "llm_pixels": torch.zeros(queries, 3, 0, 0),
        "mask_pixels": torch.zeros(queries, 3, side, side),
        "image_slot": long.new_zeros(0, 3),
        "query_image": torch.arange(queries),
        "query_slot": torch.zeros(queries, dtype=torch.long),
        "seg_position": -torch.ones(queries, 2, dtype=torch.long),
        "concept_span": long.new_zeros(0, 3),
        "query_concepts": long.new_zeros(queries, 0),
        "target_masks": torch.cat(masks) if masks else torch.zeros(0, side, side, dtype=torch.uint8),
        "target_query": torch.repeat_interleave(torch.tensor([len(m) for m in masks], dtype=torch.long)),
        "target_class": torch.cat(classes) if classes else long,
        "prompt_mask": torch.zeros(0, side, side, dtype=torch.uint8),
        "prompt_image": long,
        "region_position": long.new_zeros(0, 2),
        "ignore": None,
        "geometry": (),
        "max_queries": min(1, queries),
    }
    return Batch(**(values | fields))


def make_output(mask_logits: Tensor, class_logits: Tensor, **fields: Any) -> ModelOutput:
    """An output without text unless ``lm_logits`` and ``lm_labels`` are given."""
    values = {"lm_logits": torch.zeros(0, 5), "lm_labels": torch.zeros(0, dtype=torch.long)}
    return ModelOutput(mask_logits=mask_logits, class_logits=class_logits, **(values | fields))


def random_case(
    counts: list[int],
    *,
    layers: int = 3,
    queries: int = 5,
    labels: int = 4,
    grid: int = 6,
    canvas: int = 24,
    seed: int = 0,
) -> tuple[ModelOutput, Batch]:
    """Blobs as targets, random logits that require gradients."""
    g = torch.Generator().manual_seed(seed)
    masks = []
    for n in counts:
        coarse = torch.rand(n, 1, 4, 4, generator=g)
        masks.append((torch.nn.functional.interpolate(coarse, canvas, mode="bilinear") > 0.5)[:, 0].to(torch.uint8))
    classes = [torch.randint(labels, (n,), generator=g) for n in counts]
    mask_logits = 3 * torch.randn(layers, len(counts), queries, grid, grid, generator=g)
    class_logits = torch.randn(layers, len(counts), queries, labels + 1, generator=g)
    return make_output(mask_logits.requires_grad_(), class_logits.requires_grad_()), make_batch(masks, classes)
