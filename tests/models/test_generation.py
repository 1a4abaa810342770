"""Cached generation: the same as reading everything at once, for any batch; queries are found in the answer."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from model_cases import CATEGORIES, CLOSE, IMAGE, OPEN, SEG, STOP, TALK, batch, config, model
from torch import Tensor

from xseg.errors import UserError
from xseg.models.build import build_model
from xseg.models.generation import pairs

torch.set_num_threads(1)
PROMPT = CATEGORIES[:10]
SHORT = [1, IMAGE, OPEN, 23, CLOSE, 50]


def says(*answers: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Force one answer per sample; after its end the stop id."""

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        step = ids.shape[1]
        wanted = torch.tensor([a[step] if step < len(a) else STOP for a in answers])
        return torch.full_like(logits, -1e9).scatter(1, wanted[:, None], 0.0)

    return process


@torch.no_grad()
@pytest.mark.parametrize("language", ["phi3", "llama"])
def test_free_generation_equals_reading_it_all_at_once(language: str) -> None:
    made = model(language=language).eval()
    prompts = batch([TALK[:5], PROMPT, [1, 10, 11, 50]])
    answer = made.generate(prompts, max_new_tokens=6, stop_ids=[STOP])
    features = made.encode_images(prompts.llm_pixels, prompts.mask_pixels)
    layout, hidden = made.read(answer.batch, features)
    for sample, ids in enumerate(answer.sequences):
        assert answer.batch.input_ids[sample][answer.batch.attention_mask[sample]].tolist()[-len(ids) :] == ids
        fed = int(layout.total[sample]) - 1
        torch.testing.assert_close(answer.hidden[sample, :fed], hidden[sample, :fed], rtol=1e-4, atol=1e-4)
        logits = made.llm.lm_head(hidden[sample, layout.total[sample] - len(ids) - 1 : layout.total[sample] - 1])
        assert logits.argmax(-1).tolist() == ids


@torch.no_grad()
def test_a_sliding_window_shorter_than_the_prompt() -> None:
    sizes = config()
    sizes.text_config.sliding_window = 6
    torch.manual_seed(0)
    made = build_model(sizes).eval()
    prompts = batch([PROMPT])
    answer = made.generate(prompts, max_new_tokens=6, stop_ids=[STOP])
    layout, hidden = made.read(answer.batch, made.encode_images(prompts.llm_pixels, prompts.mask_pixels))
    fed = int(layout.total[0]) - 1
    torch.testing.assert_close(answer.hidden[0, :fed], hidden[0, :fed], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("last", [True, False])
def test_masks_of_an_answer_equal_the_teacher_forced_ones(last: bool) -> None:
    made = model().eval()
    tails = [[30, SEG] if last else [30, SEG, STOP], [SEG, STOP]]
    prompts = batch([PROMPT, SHORT], [(0, -1, [0, 1]), (1, -1, [2])])
    answer = made.generate(prompts, max_new_tokens=2 if last else 4, stop_ids=[STOP], processors=[says(*tails)])
    assert answer.sequences == tails and answer.queries == [[0], [1]]
    forced = batch([PROMPT + tails[0], SHORT + tails[1]], [(0, 0, [0, 1]), (1, 1, [2])])
    expected = made(forced)
    torch.testing.assert_close(answer.output.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.output.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_spans_of_the_answer_replace_the_concepts_and_make_a_query_where_none_was() -> None:
    made = model().eval()
    tail = [OPEN, 40, CLOSE, 31, OPEN, 41, 42, CLOSE, SEG, STOP]
    prompts = batch([TALK[:5]])
    answer = made.generate(prompts, max_new_tokens=20, stop_ids=[STOP], processors=[says(tail)])
    assert answer.batch.concept_span.tolist() == [[0, 5, 8], [0, 9, 13]]
    assert answer.batch.query_concepts.tolist() == [[0, 1]] and answer.queries == [[0]]
    expected = made(batch([TALK[:5] + tail], [(0, 0, [0, 1])]))
    torch.testing.assert_close(answer.output.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tail", [[30, STOP], [SEG, SEG, STOP]])
def test_no_or_too_many_seg_tokens_give_no_mask_but_leave_the_others_alone(tail: list[int]) -> None:
    made = model().eval()
    prompts = batch([PROMPT, SHORT], [(0, -1, [0, 1]), (1, -1, [2])])
    answer = made.generate(prompts, max_new_tokens=5, stop_ids=[STOP], processors=[says(tail, [SEG, STOP])])
    assert answer.queries == [[], [0]]
    assert answer.output.mask_logits.shape[1] == 1
    expected = made(batch([PROMPT + tail, [*SHORT, SEG, STOP]], [(1, tail.count(SEG), [2])]))
    torch.testing.assert_close(answer.output.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cached_features_give_the_same_answer() -> None:
    made, prompts = model().eval(), batch([PROMPT], [(0, -1, [0, 1])])
    features = made.encode_images(prompts.llm_pixels, prompts.mask_pixels)
    blind = dataclasses.replace(prompts, mask_pixels=torch.full_like(prompts.mask_pixels, torch.nan))
    options = {"max_new_tokens": 3, "stop_ids": [STOP], "processors": [says([SEG, STOP])]}
    first, second = made.generate(prompts, **options), made.generate(blind, features=features, **options)
    assert torch.equal(first.output.mask_logits, second.output.mask_logits)


def test_markers_that_do_not_pair_up_are_passed_over() -> None:
    ids = torch.tensor([CLOSE, OPEN, 5, OPEN, 6, CLOSE, CLOSE, OPEN, 7]).numpy()
    assert pairs(ids, OPEN, CLOSE) == [(3, 6)]


def test_generation_without_text_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="needs a prompt"):
        model().eval().generate(batch([[]], images=1), max_new_tokens=1, stop_ids=[STOP])
