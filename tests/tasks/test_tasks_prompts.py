"""Interactive and visual grounded segmentation: what is asked, where prompts come from, which mask is chosen."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import torch
from perfect import LOUD, geometry_of, perfect_output

from xseg.errors import UserError
from xseg.geometry import prompts, strokes
from xseg.geometry.masks import area, decode, encode, iou, row_rle
from xseg.metrics import truth
from xseg.metrics.video import RegionAndOutline
from xseg.tasks import interactive_seg, vgd_seg
from xseg.types import Instance, ModelOutput, Sample


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or [0])


def pointed(**options: object) -> tuple[interactive_seg.Task, Sample]:
    task = interactive_seg.Task(**options)  # type: ignore[arg-type]
    return task, task.view(task.example())


def test_every_object_is_asked_for_by_a_prompt_of_its_own() -> None:
    task, sample = pointed(kinds=("box",))
    formatted = task.format(sample, rng(0), train=False)
    assert [(q.seg, q.concepts, q.instances, q.classes) for q in formatted.queries] == [
        (0, (0,), (0,), (0,)),
        (1, (1,), (1,), (0,)),
    ], "the crowd is not asked for"
    assert len(formatted.turns) == 4 and all("<p><region></p>" in t.text for t in formatted.turns[::2])
    for prompt, row in zip(formatted.prompts, (0, 1), strict=True):
        assert iou(prompt.mask, row_rle(sample.masks, row)) > 0.7  # type: ignore[arg-type]


def test_an_objects_explanation_is_said_about_its_prompt() -> None:
    task, sample = pointed(explain="around")
    instances = (dataclasses.replace(sample.instances[0], explanation="b2."), *sample.instances[1:])
    sample = task.view(dataclasses.replace(sample, instances=instances))
    for seed in range(4):
        formatted = task.format(sample, rng(seed))
        answers = {q.instances: t.text for q, t in zip(formatted.queries, formatted.turns[1::2], strict=True)}
        assert answers[0,].startswith("b2. ") and answers[0,].endswith("<SEG>b2.")
        assert "b2" not in answers[1,]
    one = task.view(dataclasses.replace(sample, instances=sample.instances[:1]))
    asked = pointed(answer="generated")[0].format(one, rng(0), train=False)
    assert [t.role for t in asked.turns] == ["user"] and len(asked.prompts) == len(asked.queries) == 1
    assert pointed(answer="generated")[0].decode(None, (), one, None, "none").segments == ()


@pytest.mark.parametrize("kind", interactive_seg.KINDS)
def test_each_kind_of_prompt_touches_its_object_and_is_fixed_in_evaluation(kind: interactive_seg.Kind) -> None:
    task, sample = pointed(kinds=(kind,))
    fixed = [task.format(sample, rng(k), train=False).prompts for k in range(3)]
    assert fixed[0] == fixed[1] == fixed[2]
    drawn = [task.format(sample, rng(k), train=True) for k in range(8)]
    assert len({str(f.prompts) for f in drawn}) > 1, "in training at least the order changes"
    for formatted in [*drawn, task.format(sample, rng(0), train=False)]:
        for query, prompt in zip(formatted.queries, formatted.prompts, strict=True):
            own = decode(row_rle(sample.masks, query.instances[0]))  # type: ignore[arg-type]
            assert (decode(prompt.mask) & own).any()


def test_annotated_prompts_are_used_as_they_are() -> None:
    task, sample = pointed(kinds=("point",))
    formatted = task.format(sample, rng(3), train=True)
    first = next(p for q, p in zip(formatted.queries, formatted.prompts, strict=True) if q.instances == (0,))
    assert first.mask == sample.instances[0].prompts["point"] and area(first.mask) == 1


def test_an_object_too_small_to_draw_in_is_its_own_prompt() -> None:
    _, sample = pointed()
    tiny = np.zeros((16, 24), np.int32)
    tiny[3, 3:6] = 1
    small = dataclasses.replace(
        sample, masks=dataclasses.replace(sample.masks, id_map=tiny, ids=(1,)), instances=(Instance(0, -1),)
    )
    for kind in interactive_seg.KINDS:
        mask = decode(interactive_seg.prompt_of(small, 0, kind, rng(1)))
        assert (mask.astype(bool) & (tiny == 1)).any(), kind


def test_strokes_go_through_the_object_and_polygons_around_it() -> None:
    mask = np.zeros((120, 160), bool)
    mask[30:90, 40:120] = True
    inside = [float((strokes.stroke(mask, rng(k)) & mask).sum() / strokes.stroke(mask, rng(k)).sum()) for k in range(9)]
    assert min(inside) > 0.5
    around = [strokes.polygon(mask, rng(k)) for k in range(9)]
    assert all((p & mask).sum() / (p | mask).sum() > 0.7 for p in around)
    assert len({p.tobytes() for p in around}) == 9, "a hand shakes"
    square = strokes.filled((5, 6), np.array([[1, 1], [4, 1], [4, 3], [1, 3]], float))
    assert square.sum() == 12 and square[1:4, 1:5].all()


def test_of_equally_sure_masks_the_one_whose_box_fits_the_prompt_is_chosen() -> None:
    task, sample = pointed(kinds=("box",))
    masks = torch.full((1, 2, 3, 24, 24), -LOUD)
    masks[..., 0, 2:8, 2:8] = masks[..., 1, 6:14, 12:22] = masks[..., 2, 0:16, 0:24] = LOUD
    logits = torch.zeros(1, 2, 3, 2)
    logits[..., 0] = torch.tensor([2.0, 2.0, 3.0])
    output = ModelOutput(masks, logits, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    found = task.decode(output, [0, 1], sample, geometry_of(sample))
    assert [area(s.mask) for s in found.segments] == [36, 80], "not the surest one, which covers everything"
    strict = dataclasses.replace(task, score_threshold=0.9).decode(output, [0, 1], sample, geometry_of(sample))
    assert [area(s.mask) for s in strict.segments] == [384, 384], "the only one that is sure enough"
    metric, gap = task.metrics()
    metric.update(found, sample)
    gap.update(strict, sample)
    assert {s.metric: s.value for s in metric.compute()}["mIoU"] == 100
    gaps = {s.metric: s.value for s in gap.compute()}
    assert gaps["oracle IoU"] == 100
    assert gaps["selection gap"] == pytest.approx(100 - 100 * (36 + 80) / 384 / 2)
    with pytest.raises(UserError, match="1 of 2 prompts"):
        task.decode(output, [0], sample, geometry_of(sample))


def test_frames_of_clips_are_scored_by_j_and_f_too() -> None:
    task = interactive_seg.Task(frames=True)
    sample = dataclasses.replace(task.view(task.example()), kind="clip")
    formatted = task.format(sample, np.random.default_rng(0), train=False)
    prediction = task.decode(
        perfect_output(sample, formatted), range(len(formatted.queries)), sample, geometry_of(sample)
    )
    found = {}
    for metric in task.metrics():
        metric.update(prediction, sample)
        found |= {score.metric: score for score in metric.compute()}
    assert [found[name].value for name in ("J", "F", "J&F")] == [100, 100, 100]
    assert found["J"].n == 2 and "2 objects" in found["J&F"].protocol
    assert not any(isinstance(metric, RegionAndOutline) for metric in interactive_seg.Task().metrics())


def test_scores_are_given_per_kind_of_prompt() -> None:
    task, sample = pointed()
    sample = dataclasses.replace(
        sample, phrases=tuple(dataclasses.replace(p, kind=k) for p, k in zip(sample.phrases, ("box", "point")))
    )
    metric, _ = task.metrics()
    formatted = task.format(sample, rng(0), train=False)
    metric.update(task.decode(perfect_output(sample, formatted), [0, 1], sample, geometry_of(sample)), sample)
    scores = {s.metric: s for s in metric.compute()}
    assert {"mIoU", "cIoU", "mIoU:box", "cIoU:box", "mIoU:point", "cIoU:point"} <= set(scores)
    assert scores["mIoU:box"].n == 1 and "over objects" in scores["mIoU"].protocol and "N-acc" not in scores


def donor(key: str, categories: tuple[int, ...]) -> Sample:
    """A sample with an object of each category, in places of its own."""
    base = vgd_seg.Task.example()
    ids = np.zeros((16, 24), np.int32)
    for k in range(len(categories)):
        ids[4 * k : 4 * k + 3, 15:22] = k + 1
    masks = dataclasses.replace(base.masks, id_map=ids, ids=tuple(range(1, len(categories) + 1)))
    instances = tuple(Instance(k, c, id=k) for k, c in enumerate(categories))
    return dataclasses.replace(base, key=key, masks=masks, instances=instances)


def regions(formatted: object) -> int:
    return len(re.findall("<p><region></p>", formatted.turns[0].text))  # type: ignore[attr-defined]


def test_the_present_categories_are_asked_for_and_all_their_instances_are_targets() -> None:
    sample = vgd_seg.Task.example()
    formatted = vgd_seg.Task(kinds=("mask",)).format(sample, rng(0), train=False)
    (query,) = formatted.queries
    assert regions(formatted) == 2 and query.concepts == (0, 1)
    assert query.instances == (0, 1, 2) and query.classes == (1, 1, 0), "listed: bar, block; the crowd is no target"
    everything = vgd_seg.Task(kinds=("mask",), asked="all").format(sample, rng(0), train=False)
    assert regions(everything) == 3 and everything.queries[0].classes == (2, 2, 0)
    assert [area(p.mask) > 0 for p in everything.prompts] == [True, False, True], "nobody shows a disc: an empty prompt"
    lent = vgd_seg.Task(kinds=("mask",), asked="all").format(sample, rng(0), (donor("d", (1,)),), train=False)
    assert [p.image for p in lent.prompts] == [0, 1, 0] and area(lent.prompts[1].mask) > 0


@pytest.mark.parametrize(("source", "images"), [("same", {0}), ("other", {1}), ("both", {0, 1})])
def test_prompts_come_from_where_they_should(source: str, images: set[int]) -> None:
    sample, task = vgd_seg.Task.example(), vgd_seg.Task(prompts_from=source, negatives=0.0)  # type: ignore[arg-type]
    seen = set()
    for k in range(30):
        formatted = task.format(sample, rng(k), (donor("d", (0, 2)),))
        seen |= {p.image for p in formatted.prompts}
    assert seen == images
    alone = task.format(sample, rng(0), ())
    assert {p.image for p in alone.prompts} == {0}, "without a donor the image's own objects lend the prompts"


def test_absent_categories_of_donors_are_asked_for_in_training() -> None:
    sample = vgd_seg.Task.example()
    counts: Counter[int] = Counter()
    for k in range(60):
        formatted = vgd_seg.Task(negatives=0.5).format(sample, rng(k), (donor("d", (1,)),))
        (query,) = formatted.queries
        counts[len(query.concepts)] += 1
        assert len(formatted.prompts) == len(query.concepts) == regions(formatted)
        named = [query.classes[i] for i in (0, 1, 2)]
        assert named[0] == named[1] != named[2]
    assert set(counts) == {2, 3} and 10 < counts[3] < 40, "half the time, and then 0 to 5 of those there are"
    none = dataclasses.replace(sample, instances=())
    formatted = vgd_seg.Task(negatives=0.0).format(none, rng(0), (donor("d", (1,)),))
    assert formatted.queries[0].instances == () and area(formatted.prompts[0].mask) > 0


def test_candidates_bear_the_data_sets_categories() -> None:
    task, sample = vgd_seg.Task(), vgd_seg.Task.example()
    formatted = task.format(sample, rng(0), train=False)
    output = perfect_output(sample, formatted, pad=2)
    found = task.decode(output, [0], sample, geometry_of(sample))
    sure = [s for s in found.extra["instances"] if s.score > 0.5]
    assert sorted({(s.category, s.label) for s in sure}) == [(0, "bar"), (2, "block")]
    assert found.segments == () and all(truth.decode(s.mask).shape == (16, 24) for s in sure)
    bare = dataclasses.replace(sample, instances=())
    assert task.decode(output, [0], bare, geometry_of(sample)).extra["instances"] == (), "nothing was asked for"
    with pytest.raises(UserError, match="do not fit"):
        task.decode(output, [], sample, geometry_of(sample))
    with pytest.raises(UserError, match="needs a source with categories"):
        task.format(dataclasses.replace(sample, categories=None), rng(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("box",), "prompts_from": "same"}, "present in the image; one box prompt each, of the same image"),
        ({"kinds": ("point",), "asked": "all"}, "all categories"),
        ({"kinds": ("mask", "box"), "prompts_from": "other", "donors": 8}, "one mask or box prompt each, of another"),
    ],
)
def test_the_protocol_stands_in_every_row(options: dict, words: str) -> None:
    task, sample = vgd_seg.Task(**options), vgd_seg.Task.example()
    output = perfect_output(sample, task.format(sample, rng(0), train=False))
    metric, _ = task.metrics()
    metric.update(task.decode(output, [0], sample, geometry_of(sample)), sample)
    assert [s.metric for s in metric.compute()] == ["AP", "AP50"]
    assert all(words in s.protocol for s in metric.compute())


def test_a_persons_click_is_as_wide_as_the_picture_wants() -> None:
    assert interactive_seg.from_user("point", [(300, 200)], (480, 640)).sum() == 317, "a disc of radius 10"
    assert interactive_seg.from_user("point", [(30, 20)], (72, 96)).sum() == 9, "radius 1.5"
    assert interactive_seg.from_user("point", [(600, 600)], (1280, 1280)).sum() == 317, "never wider"
    small = interactive_seg.from_user("stroke", [(10, 40), (80, 40)], (96, 96))
    assert small[:, 20].sum() == 1 and small[40, 10:81].mean() > 0.95


def test_draw_and_widen_are_what_the_prompts_are_made_of() -> None:
    mask = np.zeros((60, 60), bool)
    mask[20:40, 20:40] = True
    point = interactive_seg.prompt_of(_one(mask), 0, "point", rng(5))
    assert decode(point).sum() == prompts.widen("point", prompts.draw(mask, rng(5))["point"]).sum()


def _one(mask: np.ndarray) -> Sample:
    from xseg.types import Masks

    masks = Masks((60, 60), id_map=mask.astype(np.int32), ids=(1,))
    return Sample("one", (), (60, 60), masks, (Instance(0, -1),))


@pytest.mark.parametrize(("nearest_by", "winner"), [("box", 1), ("mask", 0)])
def test_the_nearest_candidate_by_box_or_by_pixels(nearest_by: str, winner: int) -> None:
    """Two candidates for a block: one covers half of it, the other is its frame, whose box is the block's own."""
    task, sample = pointed(kinds=("mask",), nearest_by=nearest_by)
    block = prompts.from_points((16, 24), [(4, 4)])
    block[2:8, 2:8] = True
    sample = dataclasses.replace(
        sample, phrases=sample.phrases[:1], instances=(Instance(0, -1, prompts={"mask": encode(block)}),)
    )
    g = geometry_of(sample)
    masks = torch.full((1, 1, 2, 24, 24), -LOUD)
    masks[0, 0, 0, 2:8, 2:7] = LOUD
    masks[0, 0, 1, 2:8, 2:8], masks[0, 0, 1, 3:7, 3:7] = LOUD, -LOUD
    classes = torch.tensor([LOUD, 0.0]).expand(1, 1, 2, 2)
    (segment,) = task.decode(ModelOutput(masks, classes, torch.zeros(0, 8), torch.zeros(0)), [0], sample, g).segments
    assert area(segment.mask) == (30, 20)[winner]
