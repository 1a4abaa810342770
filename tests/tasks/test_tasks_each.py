"""What is particular to each task."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import torch
from perfect import LOUD, geometry_of, perfect_output

from xseg import postprocess
from xseg.errors import UserError
from xseg.metrics import truth
from xseg.tasks import conversation, generic_seg, refer_seg
from xseg.tasks.open_vocab_seg import Name, with_vocabulary
from xseg.tokens import SEG
from xseg.types import Categories, Instance, ModelOutput, Phrase, Sample, Turn, ViewGeometry


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or [0])


def spans(text: str) -> list[str]:
    return re.findall(r"<p>(.*?)</p>", text)


def test_categories_are_listed_whole_and_in_order_in_evaluation() -> None:
    formatted = generic_seg.Task().format(generic_seg.Task.example(), rng(0), train=False)
    assert spans(formatted.turns[0].text) == ["circle", "square", "grass", "sky"]
    (query,) = formatted.queries
    assert query.concepts == (0, 1, 2, 3) and query.negatives == "own"
    assert query.instances == (0, 1, 2, 3, 4) and query.classes == (3, 2, 0, 0, 1), "the crowd region is no target"


def many_categories(count: int) -> Sample:
    sample = generic_seg.Task.example()
    names = ("circle", "square", "grass", "sky", *(f"thing {k}" for k in range(count - 4)))
    categories = Categories(names, tuple(range(count)), (True,) * count)
    return dataclasses.replace(sample, categories=categories)


def test_classes_follow_the_shuffled_list() -> None:
    sample = many_categories(30)
    for k in range(30):
        formatted = generic_seg.Task(full_list=0.5, max_concepts=12).format(sample, rng(k))
        listed = spans(formatted.turns[0].text)
        (query,) = formatted.queries
        assert len(set(listed)) == len(listed) == len(query.concepts)
        named = [listed[c] for c in query.classes]
        assert named == ["sky", "grass", "circle", "circle", "square"]


def test_category_sampling_follows_its_options() -> None:
    sample = many_categories(30)

    def lengths(task: generic_seg.Task) -> Counter[int]:
        return Counter(len(task.format(sample, rng(k)).queries[0].concepts) for k in range(300))

    assert set(lengths(generic_seg.Task(full_list=1.0))) == {30}
    few = lengths(generic_seg.Task(full_list=1.0, max_concepts=12))
    assert set(few) == set(range(4, 13)), "4 present and 0 to 8 absent ones, never the whole list"
    half = lengths(generic_seg.Task(full_list=0.5, max_concepts=30))
    assert 120 < half[30] < 190 and len(half) == 27
    assert lengths(generic_seg.Task(full_list=0.0))[30] > 290, "the paper's 10000 is nearly always everything"


def test_an_image_without_targets_still_asks_for_something() -> None:
    bare = dataclasses.replace(generic_seg.Task.example(), instances=())
    for k in range(20):
        formatted = generic_seg.Task(full_list=0.0, max_concepts=1).format(bare, rng(k))
        assert len(formatted.queries[0].concepts) >= 1 and formatted.queries[0].instances == ()


def test_fixed_labels_have_no_text() -> None:
    formatted = generic_seg.Task(labels="fixed").format(generic_seg.Task.example(), rng(0))
    assert formatted.turns == ()
    (query,) = formatted.queries
    assert query.seg is None and query.concepts == () and query.classes == (3, 2, 0, 0, 1)
    task = generic_seg.Task(labels="fixed")
    sample = task.example()
    prediction = task.decode(perfect_output(sample, formatted), [0], sample, geometry_of(sample))
    metrics = task.metrics()
    for metric in metrics:
        metric.update(prediction, sample)
    assert {round(s.value, 6) for m in metrics[:3] for s in m.compute()} == {100}


@pytest.mark.parametrize("labels", ["text", "fixed"])
def test_an_object_of_no_category_is_not_taken_for_one_of_the_last(labels: str) -> None:
    sample = generic_seg.Task.example()
    unknown = dataclasses.replace(sample.instances[0], category=-1)
    unlisted = dataclasses.replace(sample, instances=(*sample.instances[1:], unknown))
    task = generic_seg.Task(labels=labels)
    for train in (True, False):
        with pytest.raises(UserError, match="has no category"):
            task.format(unlisted, rng(0), train=train)
    names = [Name(name, True) for name in sample.categories.names]
    asked = with_vocabulary(unlisted, names)
    assert len(asked.instances) == len(sample.instances) - 1, "it answers to none of the names"


def test_generic_outputs_are_what_was_asked_for() -> None:
    sample = generic_seg.Task.example()
    output = perfect_output(sample, generic_seg.Task().format(sample, rng(0), train=False))
    only = generic_seg.Task(outputs=("instance",)).decode(output, [0], sample, geometry_of(sample))
    assert only.panoptic is None and only.semantic is None and only.segments == ()
    assert {s.label for s in only.extra["instances"]} == {"circle", "square"}, "stuff is no instance"
    both = generic_seg.Task().decode(output, [0], sample, geometry_of(sample))
    assert both.panoptic is not None and both.panoptic.max() == len(both.segments)
    for k, segment in enumerate(both.segments):
        assert (truth.decode(segment.mask) == (both.panoptic == k + 1)).all()


def test_queries_are_the_rows_of_the_sample_in_the_batch() -> None:
    task, sample = refer_seg.Task(), refer_seg.Task.example()
    output = perfect_output(sample, task.format(sample, rng(0), train=False))
    order = torch.tensor([2, 0, 1])
    shuffled = ModelOutput(
        output.mask_logits[:, order], output.class_logits[:, order], output.lm_logits, output.lm_labels
    )
    one = task.decode(output, [0, 1, 2], sample, geometry_of(sample))
    other = task.decode(shuffled, [1, 2, 0], sample, geometry_of(sample))
    assert [dict(s.mask) for s in one.segments] == [dict(s.mask) for s in other.segments]


def test_phrases_are_turns_of_their_own_in_lower_case() -> None:
    task, sample = refer_seg.Task(), refer_seg.Task.example()
    texts = ["the left circle", "the right circle", "the green square"]
    targets = dict(zip(texts, [(0,), (1,), ()], strict=True))
    orders = set()
    for seed in range(8):
        formatted = task.format(sample, rng(seed), train=True)
        asked = [spans(t.text)[0] for t in formatted.turns[::2]]
        orders.add(tuple(asked))
        assert sorted(asked) == sorted(texts)
        assert [q.instances for q in formatted.queries] == [targets[text] for text in asked]
    assert len(orders) > 1, "training asks in a new order each time"
    formatted = task.format(sample, rng(0), train=False)
    assert [t.role for t in formatted.turns] == ["user", "assistant"] * 3
    assert [spans(t.text) for t in formatted.turns[::2]] == [[text] for text in texts]
    assert [(q.seg, q.concepts, q.instances, q.classes) for q in formatted.queries] == [
        (0, (0,), (0,), (0,)),
        (1, (1,), (1,), (0,)),
        (2, (2,), (), ()),
    ]


def test_an_explanation_is_said_behind_the_mask_in_training_alone() -> None:
    sample = refer_seg.Task.example()
    told = dataclasses.replace(sample.phrases[0], explanation="b2.")
    sample = dataclasses.replace(sample, phrases=(told, sample.phrases[1]))
    for seed in range(8):
        turns = refer_seg.Task().format(sample, rng(seed), train=True).turns
        answers = {spans(q.text)[0]: a.text for q, a in zip(turns[::2], turns[1::2], strict=True)}
        assert answers["the left circle"].endswith(f"{SEG}b2.")
        assert answers["the right circle"].endswith(f"{SEG}.")
    for turn in refer_seg.Task().format(sample, rng(0), train=False).turns:
        assert "b2" not in turn.text


@pytest.mark.parametrize("explain", ["before", "around"])
def test_an_explanation_may_stand_before_the_mask(explain: str) -> None:
    sample = refer_seg.Task.example()
    told = dataclasses.replace(sample.phrases[0], explanation=f" It is red{SEG}. b2.")
    sample = dataclasses.replace(sample, phrases=(told, sample.phrases[1]))
    task = refer_seg.Task(explain=explain)
    assert task.speaks_first and not refer_seg.Task().speaks_first
    for seed in range(8):
        turns = task.format(sample, rng(seed), train=True).turns
        answers = {spans(q.text)[0]: a.text for q, a in zip(turns[::2], turns[1::2], strict=True)}
        assert answers["the left circle"].startswith("It is red. b2. ")
        assert answers["the left circle"].endswith(f"{SEG}b2." if explain == "around" else f"{SEG}.")
        assert "b2" not in answers["the right circle"] and answers["the right circle"].endswith(f"{SEG}.")
    assert task.format(sample, rng(0), train=False) == refer_seg.Task().format(sample, rng(0), train=False)


def test_a_generated_answer_is_to_one_phrase() -> None:
    sample, task = refer_seg.Task.example(), refer_seg.Task(answer="generated")
    told = dataclasses.replace(sample.phrases[0], explanation="b2.")
    with pytest.raises(UserError, match="3 phrases or objects, and refer_seg"):
        task.format(sample, rng(0), train=False)
    asked = task.format(dataclasses.replace(sample, phrases=(told,)), rng(0), train=False)
    assert [turn.role for turn in asked.turns] == ["user"] and len(asked.queries) == 1
    assert "b2" not in asked.turns[0].text


def test_batch_negatives_only_in_training() -> None:
    sample = refer_seg.Task.example()

    def kinds(task: refer_seg.Task, train: bool) -> set[str]:
        return {q.negatives for q in task.format(sample, rng(0), train=train).queries}

    assert kinds(refer_seg.Task(), True) == {"batch"}
    assert kinds(refer_seg.Task(), False) == {"own"}
    assert kinds(refer_seg.Task(negatives="own"), True) == {"own"}


def test_phrase_of_several_instances_and_crowds() -> None:
    sample = refer_seg.Task.example()
    instances = (*sample.instances, Instance(1, -1, is_crowd=True))
    both = dataclasses.replace(sample, instances=instances, phrases=(Phrase("the circles", (0, 1, 2)),))
    (query,) = refer_seg.Task().format(both, rng(0)).queries
    assert query.instances == (0, 1, 1) and query.classes == (0, 0, 0), "a named crowd is a target"


def test_many_phrases_are_drawn_in_training_and_all_kept_in_evaluation() -> None:
    sample = refer_seg.Task.example()
    many = dataclasses.replace(sample, phrases=tuple(Phrase(f"the circle {k}", (0,)) for k in range(20)))
    task = refer_seg.Task(max_phrases=4)
    drawn = [tuple(spans(t.text)[0] for t in task.format(many, rng(k)).turns[::2]) for k in range(20)]
    assert {len(d) for d in drawn} == {4} and len(set(drawn)) > 10
    assert len(task.format(many, rng(0), train=False).queries) == 20


def test_phrases_lost_to_the_length_limit_are_an_error() -> None:
    task, sample = refer_seg.Task(), refer_seg.Task.example()
    output = perfect_output(sample, task.format(sample, rng(0), train=False))
    with pytest.raises(UserError, match="example/refer: 2 of 3 phrases"):
        task.decode(output, [0, 1], sample, geometry_of(sample))


def test_rejection_compares_the_best_query_with_the_background() -> None:
    sample = refer_seg.Task.example()
    formatted = refer_seg.Task().format(sample, rng(0), train=False)
    output = perfect_output(sample, formatted)
    logits = output.class_logits.clone()
    logits[0, 0, 0] = torch.tensor([1.0, 1.5])  # the phrase's best query leans to background
    unsure = dataclasses.replace(output, class_logits=logits)
    areas = []
    for reject in (0.5, 0.0):
        found = refer_seg.Task(reject=reject).decode(unsure, [0, 1, 2], sample, geometry_of(sample))
        areas.append([int(truth.decode(s.mask).sum()) for s in found.segments[:2]])
    assert areas == [[0, 20], [9, 20]]
    assert LOUD > 1.5


def test_conversation_keeps_the_words_and_breaks_what_looks_like_a_marker() -> None:
    turns = (
        Turn("user", "What is <image> this?"),
        Turn("assistant", "A page: <p>text</p> and <SEG>, <region>."),
        Turn("user", "  x <image>"),
        Turn("assistant", "y"),
    )
    sample = dataclasses.replace(conversation.Task.example(), turns=turns)
    got = conversation.Task().format(sample, rng(0)).turns
    assert got[0].text == "<image>\nWhat is  this?"
    assert got[1].text == "A page: < p>text< /p> and < SEG>, < region>."
    assert got[2].text == "  x "
    asked = conversation.Task().format(sample, rng(0), train=False)
    assert asked.turns == got[:3] and asked.queries == ()


def test_conversation_without_an_image_has_no_image_token() -> None:
    sample = dataclasses.replace(conversation.Task.example(), images=())
    assert "<image>" not in "".join(t.text for t in conversation.Task().format(sample, rng(0)).turns)


def test_conversation_answer_is_scored_by_kind() -> None:
    task, sample = conversation.Task(), conversation.Task.example()
    (metric,) = task.metrics()
    other = dataclasses.replace(sample, kind="count", image_id=2)
    metric.update(task.decode(None, [], sample, geometry_of(sample), "red.<|end|>"), sample)
    metric.update(task.decode(None, [], other, geometry_of(sample), "blue"), other)
    assert {s.metric: s.value for s in metric.compute()} == {
        "exact match": 50,
        "exact match:colour": 100,
        "exact match:count": 0,
    }


def test_semantic_maps_are_averaged_where_the_option_says() -> None:
    sample = generic_seg.Task.example()
    g, draw = ViewGeometry(sample.size, (4, 6), 6), torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 6, 5, generator=draw) * 3
    output = ModelOutput(torch.randn(1, 1, 6, 4, 4, generator=draw) * 9, logits, torch.zeros(0, 8), torch.zeros(0))
    given = output.mask_logits[0, 0], output.class_logits[0, 0], g
    found = {}
    for average in ("canvas", "original"):
        task = generic_seg.Task(outputs=("semantic",), semantic_average=average)  # type: ignore[arg-type]
        found[average] = task.decode(output, [0], sample, g).semantic
        assert np.array_equal(found[average], postprocess.semantic(*given, average=average))  # type: ignore[arg-type]
    assert not np.array_equal(found["canvas"], found["original"])
