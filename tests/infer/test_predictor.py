"""Vocabularies and drawn prompts through the stateless predictor."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import LOUD, SIDE, oracle
from PIL import Image

from xseg.encode import Encoder
from xseg.errors import UserError
from xseg.geometry import masks as rle
from xseg.infer.predictor import Predictor
from xseg.types import Batch, ModelOutput

PICTURE = Image.fromarray(np.zeros((32, 64, 3), np.uint8))


class Blocks(torch.nn.Module):
    """Two blocks of the first concept and two of the second, whatever the picture shows."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.encoder = encoder
        self.seen: list[Batch] = []
        self.says = "It is there."
        """The generated answer; its masks are half as high."""

    def forward(self, batch: Batch) -> ModelOutput:
        self.seen.append(batch)
        masks = torch.full((1, 1, 4, SIDE, SIDE), -LOUD)
        logits = torch.full((1, 1, 4, batch.query_concepts.shape[1] + 1), -LOUD)
        for k in range(4):
            masks[0, 0, k, 2:18, 16 * k + 1 : 16 * k + 13] = LOUD
            logits[0, 0, k, min(k // 2, logits.shape[-1] - 2)] = LOUD - k
        return ModelOutput(masks, logits, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))

    def generate(self, batch: Batch, *, max_new_tokens: int, stop_ids: Any, features: Any) -> SimpleNamespace:
        assert (batch.seg_position < 0).all() and max_new_tokens > 10 and stop_ids
        output = self.forward(batch)
        output.mask_logits[..., 10:, :] = -LOUD
        ids = self.encoder.tokenizer(self.says, add_special_tokens=False)["input_ids"]
        fits = ids.count(self.encoder.special.seg) == 1
        return SimpleNamespace(batch=batch, sequences=[ids], queries=[[0] if fits else []], output=output)


def predictor() -> Predictor:
    processor = oracle().processor
    assert processor.encoder is not None
    return Predictor(Blocks(processor.encoder), processor)


def test_a_vocabulary_gives_objects_or_regions() -> None:
    found = predictor().segment(PICTURE, "ins: circle; sem: grass")
    areas = sorted((s.label, rle.area(s.mask)) for s in found.segments)
    assert areas == [("circle", 192), ("circle", 192), ("grass", 384)]
    swapped = predictor().segment(PICTURE, "sem: circle; ins: grass")
    assert sorted(s.label for s in swapped.segments) == ["circle", "grass", "grass"]
    one = predictor().segment(PICTURE, "ins: circle")
    assert len(one.segments) == 4, "one name of a vocabulary still gives every object"
    assert len(predictor().segment(PICTURE, "the circle").segments) == 1
    with pytest.raises(UserError, match="stands twice"):
        predictor().segment(PICTURE, "ins: a, a")


def test_a_model_that_speaks_first_answers_a_phrase_itself_where_it_can() -> None:
    made = predictor()
    made.processor.speaks_first = ["refer_seg"]
    given, listed = made.segment(PICTURE, "the circle"), made.segment(PICTURE, ["the circle", "the square"])
    assert rle.area(given.rle) == 192 and (made.model.seen[1].seg_position >= 0).all(), "words without a mask"
    made.model.says = "Sure, <p>the square</p> <SEG>."
    assert rle.area(made.segment(PICTURE, "the circle").rle) == 192, "a mask of something else"
    made.model.says = "b2. Sure, <SEG>b2."
    seen = len(made.model.seen)
    own = made.segment(PICTURE, "the circle")
    assert len(made.model.seen) == seen + 1 and rle.area(own.rle) == 96
    again = made.segment(PICTURE, ["the circle", "the square"])
    assert [rle.area(s.mask) for s in again.segments] == [rle.area(s.mask) for s in listed.segments], "lists are given"
    assert rle.area(made.segment(PICTURE, ["the circle"]).rle) == 192, "of one name too"
    made.processor.speaks_first = ["interactive_seg"]
    assert rle.area(made.segment(PICTURE, "the circle").rle) == 192
    assert rle.area(made.select(PICTURE, "point", [(6, 4)]).rle) == 96
    made.processor.speaks_first = []
    assert rle.area(made.select(PICTURE, "point", [(6, 4)]).rle) == 192


def test_a_rejected_phrase_is_empty_until_it_must_not_be() -> None:
    made = predictor()
    shy = made.model.forward

    def unsure(batch: Batch) -> ModelOutput:
        output = shy(batch)
        output.class_logits[..., -1] = output.class_logits[..., 0] + 0.5
        return output

    made.model.forward = unsure
    assert [made.segment(PICTURE, "the circle", reject=r).found for r in (0.5, 0.3, 0.0)] == [False, True, True]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("point", [(40, 8)]),
        ("scribble", [(35, 4), (43, 15)]),
        ("stroke", [(35, 4), (40, 15), (44, 4)]),
        ("polygon", [(34, 3), (45, 3), (45, 17), (34, 17)]),
        ("box", (33, 2, 45, 18)),
        ("mask", np.pad(np.ones((16, 12), bool), ((2, 14), (33, 19)))),
    ],
)
def test_a_drawn_prompt_selects_the_object_it_points_at(kind: str, where: object) -> None:
    made = predictor()
    found = made.select(PICTURE, kind, where)
    assert rle.decode(found.segments[0].mask)[2:18, 33:45].all() and rle.area(found.rle) == 192
    (batch,) = made.model.seen
    assert batch.prompt_mask.any() and batch.prompt_image.tolist() == [0] and len(batch.region_position) == 1


def test_a_model_that_never_saw_a_prompt_refuses_one() -> None:
    made = predictor()
    made.processor.learnt = ["generic_seg", "refer_seg"]
    with pytest.raises(UserError, match="has learnt generic_seg, refer_seg, not interactive_seg"):
        made.select(PICTURE, "point", [(6, 4)])
    made.processor.learnt.append("interactive_seg")
    assert made.select(PICTURE, "point", [(6, 4)]).found


def test_only_pictures_and_paths_are_images() -> None:
    with pytest.raises(UserError, match="8 bits a channel"):
        predictor().segment(Image.fromarray(np.zeros((8, 8), np.uint16)), "the circle")
    with pytest.raises(UserError, match="image of type ndarray"):
        predictor().segment(np.zeros((8, 8, 3), np.uint8), "the circle")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "where", "message"),
    [
        ("boxx", (0, 0, 1, 1), "did you mean 'box'"),
        ("point", [(99, 8)], "no pixel of it lies in the image"),
        ("box", (1, 2, 3), "box "),
        ("mask", np.ones((3, 3), bool), "mask "),
        ("polygon", [(1, 2, 3)], "polygon "),
    ],
)
def test_prompts_that_mean_nothing_are_named(kind: str, where: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predictor().select(PICTURE, kind, where)
