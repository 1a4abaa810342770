"""A stand-in for XSegModel that knows the targets of its batch, and what evaluation needs around it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from xseg.data.shapeworld.write import write
from xseg.encode import Encoder
from xseg.geometry.views import ViewSizes
from xseg.infer.predictor import Predictor
from xseg.infer.processing import XSegProcessor
from xseg.paths import find
from xseg.tokens import add_special_tokens
from xseg.types import Batch, ModelOutput

LOUD = 30.0
SIDE = 64


class Oracle(torch.nn.Module):
    """Answers every query with its target masks; where there are none, with ``mask`` for the first concept.

    ``generate`` says ``answers`` in turn. ``encoded`` and ``forwards`` count the calls.
    """

    def __init__(self, encoder: Encoder | None, labels: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(segmentor_config=SimpleNamespace(num_labels=labels))
        self.encoder, self.answers = encoder, ["Sure, the segmentation mask is <SEG>."]
        self.mask: torch.Tensor | None = None
        self.concept = 0
        self.encoded = self.forwards = self.said = 0
        self.seen: list[Batch] = []

    def forward(self, batch: Batch) -> ModelOutput:
        self.forwards += 1
        self.seen.append(batch)
        count = len(batch.query_image)
        side = batch.mask_pixels.shape[-1]
        concepts = batch.query_concepts.shape[1] or self.config.segmentor_config.num_labels
        per_query = torch.bincount(batch.target_query, minlength=count) if count else torch.zeros(0)
        objects = int(per_query.max()) + 2 if count else 1
        masks = torch.full((1, count, objects, side, side), -LOUD)
        logits = torch.zeros(1, count, objects, concepts + 1)
        logits[..., -1] = LOUD
        place = [0] * count
        rows = zip(batch.target_query.tolist(), batch.target_class.tolist(), batch.target_masks, strict=True)
        for query, category, mask in rows:
            masks[0, query, place[query]][mask.bool()] = LOUD
            logits[0, query, place[query], -1], logits[0, query, place[query], category] = 0, LOUD
            place[query] += 1
        if self.mask is not None:
            masks[0, :, 0][:, self.mask] = LOUD
            logits[0, :, 0, -1], logits[0, :, 0, self.concept] = 0, LOUD
        return ModelOutput(masks, logits, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))

    def encode_images(self, llm_pixels: torch.Tensor, mask_pixels: torch.Tensor) -> Any:
        self.encoded += 1
        return "features"

    def generate(self, batch: Batch, *, max_new_tokens: int, stop_ids: Any, features: Any = None) -> Any:
        assert self.encoder is not None
        if features is None:
            self.encode_images(batch.llm_pixels, batch.mask_pixels)
        sequences = []
        for _ in batch.keys:
            text = self.answers[self.said % len(self.answers)]
            self.said += 1
            sequences.append([*self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"], stop_ids[0]])
        output = self.forward(batch) if len(batch.query_image) else None
        fits = [ids.count(self.encoder.special.seg) == 1 for ids in sequences]
        queries = [[int(r)] if ok else [] for r, ok in enumerate(fits)] if output else [[] for _ in sequences]
        return SimpleNamespace(batch=batch, sequences=sequences, output=output, queries=queries)


def encoder() -> Encoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find("examples/tiny_parts/phi", "train_stages/models", suffix=""))
    add_special_tokens(tokenizer)
    return Encoder(tokenizer, find("phi3", "chat_templates", ".jinja").read_text(encoding="utf8"), 512)


def oracle(text: bool = True, labels: int = 0) -> Predictor:
    found = encoder() if text else None
    return Predictor(Oracle(found, labels), XSegProcessor(found, ViewSizes(SIDE, 32 if text else 0)))


def shapes(root: Path, images: int = 5) -> Path:
    """A data root with a small ShapeWorld val split."""
    write(root / "shapes/val", images, 0, size=SIDE, split="val")
    return root
