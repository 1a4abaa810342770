"""Generalised referring, reasoning, open vocabulary and grounded captions: what is particular to each."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from perfect import LOUD, geometry_of, perfect_output

from xseg.errors import UserError
from xseg.geometry.masks import area, decode, encode, row_rle
from xseg.metrics.captions import caption
from xseg.tasks import gcg_seg, generic_seg, open_vocab_seg, reason_seg, refer_seg
from xseg.types import ModelOutput, Phrase, Segment, Turn


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or [0])


def spans(text: str) -> list[str]:
    return re.findall(r"<p>(.*?)</p>", text)


def output_of(masks: torch.Tensor, probabilities: list[list[float]]) -> ModelOutput:
    """One query per row of ``probabilities``: what each decoder query gives the phrase against the background."""
    prob = torch.tensor(probabilities)
    logits = torch.stack([prob.log(), (1 - prob).log()], -1)[None]
    return ModelOutput(masks, logits, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))


def test_several_targets_are_joined_and_the_threshold_says_what_is_not_there() -> None:
    sample = refer_seg.Task.example()
    sample = dataclasses.replace(sample, phrases=(Phrase("the circles", (0, 1), kind="several"), Phrase("a star")))
    masks = torch.full((1, 2, 3, 12, 12), -LOUD)
    masks[0, :, 0, 1:4, 1:4] = masks[0, :, 1, 3:7, 6:11] = masks[0, :, 2, 0, 0:12] = LOUD
    output = output_of(masks, [[0.9, 0.7, 0.2], [0.4, 0.1, 0.1]])
    areas = {
        (reject, join): [area(s.mask) for s in decoded.segments]
        for reject in (0.0, 0.3, 0.5)
        for join in (None, 0.6)
        for decoded in [refer_seg.Task(reject=reject, join=join).decode(output, [0, 1], sample, geometry_of(sample))]
    }
    assert areas[0.5, 0.6] == [29, 0], "both circles; the star is less likely than the background"
    assert areas[0.5, None] == [9, 0] and areas[0.3, 0.6] == [29, 9] and areas[0.0, None] == [9, 9]
    found = refer_seg.Task(join=0.6).decode(output, [0, 1], sample, geometry_of(sample))
    assert [round(s.score, 3) for s in found.segments] == [0.9, 0.4], "a rejected phrase keeps its probability"


def test_the_sentences_of_a_reference_may_be_one_phrase() -> None:
    base = refer_seg.Task.example()
    phrases = (
        Phrase("left one", (0,), "7:0", "a"),
        Phrase("right one", (1,), "8:0", "b"),
        Phrase("small circle", (0,), "7:1", "a"),
    )
    sample = dataclasses.replace(base, phrases=phrases)
    task = refer_seg.Task(sentences="merged")
    seen = task.view(sample)
    assert [(p.text, p.instances, p.id) for p in seen.phrases] == [
        ("left one. small circle", (0,), "7"),
        ("right one", (1,), "8"),
    ]
    formatted = task.format(seen, rng(0), train=False)
    assert [spans(t.text) for t in formatted.turns[::2]] == [["left one. small circle"], ["right one"]]
    metric = task.metrics()[0]
    metric.update(task.decode(perfect_output(seen, formatted), [0, 1], seen, geometry_of(seen)), seen)
    ciou = next(s for s in metric.compute() if s.metric == "cIoU")
    assert ciou.n == 2 and "merged" in ciou.protocol
    each = refer_seg.Task().metrics()[0]
    every = refer_seg.Task().format(sample, rng(0), train=False)
    each.update(refer_seg.Task().decode(perfect_output(sample, every), [0, 1, 2], sample, geometry_of(sample)), sample)
    assert each.compute()[0].n == 3 and "merged" not in each.compute()[0].protocol
    with pytest.raises(UserError, match="needs 'reference:sentence'"):
        task.view(base)


def test_a_question_is_one_concept_with_the_instruction_behind_it() -> None:
    sample = reason_seg.Task.example()
    formatted = reason_seg.Task().format(sample, rng(0), train=False)
    first, second = (formatted.turns[k].text for k in (0, 2))
    assert first.startswith("<image>\n<p>What could roll farther?</p> ") and spans(first) == [
        "What could roll farther?"
    ]
    assert spans(second) == ["the odd one out"], "a short phrase is asked for as an expression is"
    assert [q.instances for q in formatted.queries] == [(1,), (0,)]
    assert "momentum" not in formatted.turns[1].text, "evaluation asks for the mask alone"


@pytest.mark.parametrize(("asks", "low", "high"), [(0.0, 0, 0), (0.5, 20, 60), (1.0, 80, 80)])
def test_an_explanation_stands_before_the_mask_where_it_is_asked_for(asks: float, low: int, high: int) -> None:
    sample = reason_seg.Task.example()
    explained = 0
    for k in range(80):
        turns = reason_seg.Task(asks=asks).format(sample, rng(k)).turns
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert answer.text.count("<SEG>") == 1
            if answer.text.startswith("The larger disc keeps its momentum longer. "):
                explained += 1
                assert "roll" in question.text and re.search("reason|why|explain|makes you", question.text)
    assert low <= explained <= high


def test_a_model_that_always_explains_is_asked_to_in_evaluation() -> None:
    sample = reason_seg.Task.example()
    one = dataclasses.replace(sample, phrases=sample.phrases[:1])
    assert not reason_seg.Task().speaks_first, "half of its answers have no explanation"
    task = reason_seg.Task(asks=1.0, explain="around")
    told = "The larger disc keeps its momentum longer."
    answer = task.format(one, rng(0)).turns[-1].text
    assert task.speaks_first and answer.startswith(f"{told} ") and answer.endswith(f"<SEG>{told}")
    (asked,) = reason_seg.Task(answer="generated").format(one, rng(0), train=False).turns
    assert "Explain why" in asked.text and told not in asked.text
    with pytest.raises(UserError, match="2 phrases or objects, and reason_seg"):
        reason_seg.Task(answer="generated").format(sample, rng(0), train=False)


def test_a_question_about_several_objects_has_one_mask() -> None:
    sample = reason_seg.Task.example()
    both = dataclasses.replace(sample, phrases=(dataclasses.replace(sample.phrases[0], instances=(0, 1)),))
    task = reason_seg.Task()
    seen = task.view(both)
    (query,) = task.format(seen, np.random.default_rng(0)).queries
    (row,) = query.instances
    assert area(row_rle(seen.masks, row)) == sum(area(row_rle(sample.masks, i)) for i in (0, 1))
    assert query.classes == (0,) and len(seen.instances) == 3 and task.view(sample) is sample


def test_ignored_pixels_count_neither_way() -> None:
    task, sample = reason_seg.Task(), reason_seg.Task.example()
    formatted = task.format(sample, rng(0), train=False)
    output = perfect_output(sample, formatted)
    output.mask_logits[:, :, 0, 7, :] = LOUD  # the ignored row
    prediction = task.decode(output, [0, 1], sample, geometry_of(sample))
    assert area(prediction.segments[0].mask) == 20 + 12
    metric = task.metrics()[0]
    metric.update(prediction, sample)
    scores = {s.metric: s.value for s in metric.compute()}
    assert scores["cIoU"] == scores["gIoU:long"] == scores["gIoU:short"] == 100


def test_the_grammar_of_vocabularies() -> None:
    read = open_vocab_seg.read_vocabulary
    assert [(n.text, n.is_thing) for n in read(" ins: Person,  traffic  light ;sem:water , Sky")] == [
        ("person", True),
        ("traffic light", True),
        ("water", False),
        ("sky", False),
    ]
    for text, message in (
        ("person, bird", "'kind: names'"),
        ("inst: person", "did you mean 'ins'"),
        ("ins: person,, bird", "empty name"),
        ("ins: a; sem:", "empty name"),
        ("ins: a; sem: A", "'a' stands twice"),
    ):
        with pytest.raises(UserError, match=message):
            read(text)


def test_a_vocabulary_replaces_the_categories() -> None:
    base = generic_seg.Task.example()  # circles 2 and 3, a square 4, grass and sky
    task = open_vocab_seg.Task(vocabulary="ins: square, zebra; sem: sky, circle")
    sample = task.view(base)
    assert sample.categories is not None
    assert sample.categories.names == ("square", "zebra", "sky", "circle")
    assert sample.categories.is_thing == (True, True, False, False)
    assert sample.categories.ids == (2, -2, 9, 1) and len(set(sample.categories.ids)) == 4
    found = [(i.category, i.is_crowd, int(decode(row_rle(sample.masks, i.mask)).sum())) for i in sample.instances]  # type: ignore[arg-type]
    assert sorted(found) == sorted(
        [
            (2, False, area(row_rle(base.masks, 0))),  # type: ignore[arg-type]
            (3, False, area(row_rle(base.masks, 2)) + area(row_rle(base.masks, 3))),  # type: ignore[arg-type]
            (0, False, area(row_rle(base.masks, 4))),  # type: ignore[arg-type]
            (3, True, area(row_rle(base.masks, 5))),  # type: ignore[arg-type]
        ]
    ), "both circles are one segment, the crowd stays apart, grass is void"
    # a perfect model says nothing about crowds, which here would flow into the region of that name
    sample = dataclasses.replace(sample, instances=tuple(i for i in sample.instances if not i.is_crowd))
    formatted = task.format(sample, rng(0), train=False)
    assert spans(formatted.turns[0].text) == ["square", "zebra", "sky", "circle"]
    metrics = task.metrics()
    prediction = task.decode(perfect_output(sample, formatted), [0], sample, geometry_of(sample))
    for metric in metrics:
        metric.update(prediction, sample)
    values = {s.metric: s.value for m in metrics for s in m.compute()}
    assert [values["PQ"], values["AP"], values["mIoU"]] == pytest.approx([100, 100, 100])
    assert open_vocab_seg.Task().view(base) is base


def test_unseen_names_are_scored_apart_and_must_be_asked_for() -> None:
    base = generic_seg.Task.example()
    task = open_vocab_seg.Task(unseen=("square",))
    sample = dataclasses.replace(base, instances=tuple(i for i in base.instances if not i.is_crowd))
    assert task.view(sample) is sample
    formatted = task.format(sample, rng(0), train=False)
    prediction = task.decode(perfect_output(sample, formatted), [0], sample, geometry_of(sample))
    metrics = task.metrics()
    for metric in metrics:
        metric.update(prediction, sample)
    values = {s.metric: s.value for m in metrics for s in m.compute()}
    assert values["PQ unseen"] == pytest.approx(100) and "AP" in values and "mIoU" in values
    with pytest.raises(UserError, match=r"unseen: 'sqare' .*; did you mean 'square'"):
        open_vocab_seg.Task(unseen=("sqare",)).view(base)
    with pytest.raises(UserError, match="unseen: 'circle'"):
        open_vocab_seg.Task(vocabulary="ins: square", unseen=("circle",)).view(base)


def test_a_caption_is_lower_case_with_its_spans_and_one_seg() -> None:
    sample = gcg_seg.Task.example()
    for k in range(10):
        formatted = gcg_seg.Task().format(sample, rng(k))
        answer = formatted.turns[-1].text
        assert answer.startswith("there are <p>two circles</p> over <p>the grass</p> .")
        assert answer.count("<SEG>") == 1 and caption(answer) == "there are two circles over the grass ."
        (query,) = formatted.queries
        assert (query.concepts, query.instances, query.classes) == ((0, 1), (0, 1, 2), (0, 0, 1)), "a span of two masks"
    asked = gcg_seg.Task().format(sample, rng(0), train=False)
    assert len(asked.turns) == 1 and asked.queries == ()


def test_captions_without_spans_and_with_too_many() -> None:
    base = gcg_seg.Task.example()
    plain = dataclasses.replace(base, turns=(Turn("assistant", "A Meadow"),))
    formatted = gcg_seg.Task().format(plain, rng(0))
    assert formatted.turns[-1].text == "a meadow." and formatted.queries == ()
    with pytest.raises(UserError, match="example/gcg: the caption has 2 <p> spans for 1 phrases"):
        gcg_seg.Task().format(dataclasses.replace(base, phrases=base.phrases[:1]), rng(0))
    with pytest.raises(UserError, match=r"example/gcg: .*needs a caption"):
        gcg_seg.Task().format(dataclasses.replace(base, turns=()), rng(0))


def test_spans_of_the_answer_get_masks_by_their_place() -> None:
    sample = gcg_seg.Task.example()
    masks = torch.full((1, 1, 3, 12, 12), -LOUD)
    masks[0, 0, 0, 1:4, 1:4] = masks[0, 0, 1, 1:5, 6:11] = masks[0, 0, 2, 6:8] = LOUD
    logits = torch.full((1, 1, 3, 5), -LOUD)  # two spans, two columns of a longer answer, background
    logits[0, 0, 0, 0], logits[0, 0, 1, 0], logits[0, 0, 2, 1] = 3.0, 2.0, 3.0
    logits[0, 0, :, -1] = 0.0
    output = ModelOutput(masks, logits, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    text = "<p> odd <p>circles</p> and <p>grass</p>. It is <SEG>."
    one = gcg_seg.Task().decode(output, [0], sample, geometry_of(sample), text)
    assert [(s.label, s.category, area(s.mask)) for s in one.segments] == [("circles", 0, 9), ("grass", 1, 24)]
    painted = gcg_seg.overwritten([*one.segments, Segment(encode(np.ones((8, 12), np.uint8)), 2)])
    assert [area(s.mask) for s in painted] == [0, 0, 96], "a later span takes the pixels of the earlier ones"
    several = gcg_seg.Task(join=0.5).decode(output, [0], sample, geometry_of(sample), text)
    assert [(s.category, area(s.mask)) for s in several.segments] == [(0, 9), (0, 20), (1, 24)]
    for rows, words in (([], text), ([0], "no spans, <SEG>.")):
        assert gcg_seg.Task().decode(output, rows, sample, geometry_of(sample), words).segments == ()
    gaps = {s.metric: s.value for s in _gap(one, sample)}
    assert gaps["oracle IoU"] == 100 and gaps["selection gap"] == pytest.approx(100 / 3), "one circle was not given out"


def _gap(prediction: object, sample: object) -> list:
    metric = gcg_seg.Task().metrics()[1]
    metric.update(prediction, sample)
    return metric.compute()
