"""Post-processing: equal to upsampling everything first; what is kept, dropped and merged."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hotcoco import mask as coco_mask
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from xseg import postprocess
from xseg.types import Segment, ViewGeometry


def plain(mask_logits: Tensor, g: ViewGeometry) -> Tensor:
    """Upsample all to the canvas, crop the padding away, resize to the original."""
    canvas = F.interpolate(mask_logits[None], (g.canvas, g.canvas), mode="bilinear")
    cut = canvas[..., : g.scaled[0], : g.scaled[1]]
    return F.interpolate(cut, g.original, mode="bilinear")[0]


def decode(segment: Segment) -> np.ndarray:
    return np.asarray(coco_mask.decode(dict(segment.mask))).astype(bool)


geometries = st.builds(
    lambda h, w, canvas: ViewGeometry(
        (h, w),
        tuple(max(1, int(n * canvas / max(h, w) + 0.5)) for n in (h, w)),
        canvas,  # type: ignore[arg-type]
    ),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([16, 24, 40, 64]),
)


def case(seed: int, queries: int = 6, labels: int = 4, grid: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, queries, 3, 3, generator=g)
    masks = 4 * F.interpolate(coarse, grid, mode="bicubic")[0]
    return masks, 3 * torch.randn(queries, labels + 1, generator=g)


@settings(max_examples=40, deadline=None)
@given(geometries, st.integers(0, 99))
def test_the_composed_map_is_the_plain_way(g: ViewGeometry, seed: int) -> None:
    masks, _ = case(seed)
    torch.testing.assert_close(postprocess.to_original(masks, g), plain(masks, g), atol=2e-4, rtol=1e-4)


def plain_panoptic(full: Tensor, classes: Tensor, things: list[bool], threshold: float) -> tuple[np.ndarray, list[int]]:
    """The rule written out on masks that are already in original pixels."""
    scores, labels = classes.softmax(-1)[:, :-1].max(-1)
    kept = [q for q in range(len(full)) if scores[q] > threshold]
    out = np.zeros(full.shape[1:], np.int32)
    if not kept:
        return out, []
    prob = torch.stack([full[q].sigmoid() * scores[q] for q in kept])
    owner = prob.argmax(0).numpy()
    categories: list[int] = []
    for k, q in enumerate(kept):
        won, area = int((owner == k).sum()), int((prob[k] >= 0.5).sum())
        label = int(labels[q])
        assume(abs(won - 0.8 * area) > 2)  # rounding may decide otherwise
        if not won or not area or won / area <= 0.8:
            continue
        if things[label] or label not in categories:
            categories.append(label)
            out[owner == k] = len(categories)
        else:
            out[owner == k] = categories.index(label) + 1
    return out, categories


@settings(max_examples=40, deadline=None)
@given(geometries, st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([1, 300, 2**23]))
def test_panoptic_equals_upsampling_all_first(g: ViewGeometry, seed: int, threshold: float, chunk: int) -> None:
    masks, classes = case(seed)
    things = [True, False, False, True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "CHUNK", chunk)
        id_map, segments = postprocess.panoptic(masks, classes, g, is_thing=things, score_threshold=threshold)
    expected, categories = plain_panoptic(plain(masks, g), classes, things, threshold)
    assert id_map.dtype == np.int32 and id_map.shape == g.original
    # A pixel may flip where two predictions are equal to rounding.
    assert (id_map != expected).mean() <= 2e-3 + 1 / id_map.size
    assert [s.category for s in segments] == categories
    for i, segment in enumerate(segments, start=1):
        assert np.array_equal(decode(segment), id_map == i)


@settings(max_examples=40, deadline=None)
@given(geometries, st.integers(0, 99), st.sampled_from([1, 300, 2**23]))
def test_semantic_equals_upsampling_all_first(g: ViewGeometry, seed: int, chunk: int) -> None:
    masks, classes = case(seed)
    weights = classes.softmax(-1)[:, :-1]
    canvas = F.interpolate(masks[None], (g.canvas, g.canvas), mode="bilinear")[0].sigmoid()
    sums = torch.einsum("qc,qhw->chw", weights, canvas)[..., : g.scaled[0], : g.scaled[1]]
    on_canvas = F.interpolate(sums[None], g.original, mode="bilinear")[0].argmax(0).numpy()
    in_original = torch.einsum("qc,qhw->chw", weights, plain(masks, g).sigmoid()).argmax(0).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "CHUNK", chunk)
        for average, expected in (("canvas", on_canvas), ("original", in_original)):
            label = postprocess.semantic(masks, classes, g, average=average)
            assert (label != expected).mean() <= 2e-3 + 1 / label.size


@settings(max_examples=40, deadline=None)
@given(geometries, st.integers(0, 99), st.integers(1, 30), st.sampled_from([0.0, 0.4]), st.sampled_from([1, 2**23]))
def test_instances_equal_upsampling_all_first(
    g: ViewGeometry, seed: int, top_k: int, threshold: float, chunk: int
) -> None:
    masks, classes = case(seed)
    full = plain(masks, g)
    prob = classes.softmax(-1)[:, :-1]
    expected = []
    for score, flat in zip(*prob.flatten().topk(min(top_k, prob.numel())), strict=True):
        query, label = divmod(int(flat), prob.shape[1])
        inside = full[query] > 0
        mean = full[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
        if inside.any() and score * mean >= threshold:
            expected.append((float(score * mean), label, int(inside.sum())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "CHUNK", chunk)
        found = postprocess.instances(masks, classes, g, top_k=top_k, score_threshold=threshold)
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    assert len(found) == len(expected)
    for segment, (score, label, area) in zip(found, sorted(expected, reverse=True), strict=True):
        assert segment.score == pytest.approx(score, abs=2e-3) and segment.category == label
        assert abs(int(decode(segment).sum()) - area) <= 1 + 2e-3 * g.original[0] * g.original[1]


@settings(max_examples=30, deadline=None)
@given(geometries, st.integers(0, 99), st.integers(0, 3))
def test_best_equals_upsampling_all_first(g: ViewGeometry, seed: int, concept: int) -> None:
    masks, classes = case(seed)
    query = int(classes.softmax(-1)[:, concept].argmax())
    expected = (plain(masks, g)[query].sigmoid() > 0.5).numpy()
    found = postprocess.best(masks, classes, g, concept=concept)
    assert (decode(found) != expected).mean() <= 2e-3 + 1 / expected.size
    assert found.score == pytest.approx(float(classes.softmax(-1)[query, concept])) and found.category == concept


def squares() -> tuple[Tensor, ViewGeometry]:
    """Two predictions, left and right half of an 8 x 8 image."""
    masks = torch.full((2, 8, 8), -20.0)
    masks[0, :, :4], masks[1, :, 4:] = 20.0, 20.0
    return masks, ViewGeometry((8, 8), (8, 8), 8)


def test_stuff_is_merged_and_things_are_not() -> None:
    masks, g = squares()
    classes = torch.tensor([[9.0, 0, 0], [8.0, 0, 0]])
    id_map, segments = postprocess.panoptic(masks, classes, g, is_thing=[False, True], score_threshold=0.5)
    assert (id_map == 1).all() and len(segments) == 1 and decode(segments[0]).all()
    assert segments[0].score == pytest.approx(float(classes[0].softmax(-1)[0]))
    id_map, segments = postprocess.panoptic(masks, classes, g, is_thing=[True, True], score_threshold=0.5)
    assert (id_map[:, :4] == 1).all() and (id_map[:, 4:] == 2).all() and len(segments) == 2


def test_a_prediction_hidden_by_a_better_one_leaves_void() -> None:
    masks, g = squares()
    masks[1] = torch.where(torch.arange(8) >= 3, 20.0, -20.0)
    masks[0, :, :] = 20.0
    masks[0, :, 7] = -20.0
    classes = torch.tensor([[9.0, 0, 0], [0, 3.0, 0]])
    id_map, segments = postprocess.panoptic(masks, classes, g, is_thing=[True, True], score_threshold=0.5)
    assert [s.category for s in segments] == [0]
    assert (id_map[:, :7] == 1).all() and (id_map[:, 7] == 0).all()


def test_reject_gives_an_empty_mask_only_when_background_wins() -> None:
    masks, g = squares()
    for background, empty in ((5.0, True), (1.0, False)):
        classes = torch.tensor([[2.0, background], [-2.0, 0.0]])
        assert decode(postprocess.best(masks, classes, g, reject=0.5)).any() != empty
        assert decode(postprocess.best(masks, classes, g)).any()


def test_nothing_above_the_threshold_and_nothing_at_all() -> None:
    masks, g = squares()
    classes = torch.zeros(2, 3)
    for m, c in ((masks, classes), (masks[:0], classes[:0])):
        id_map, segments = postprocess.panoptic(m, c, g, is_thing=[True, True], score_threshold=0.9)
        assert not id_map.any() and not segments
        assert postprocess.instances(m, c, g, score_threshold=0.9) == []


def test_an_empty_mask_is_no_instance() -> None:
    masks, g = squares()
    masks[1] = -20.0
    found = postprocess.instances(masks, torch.zeros(2, 3), g, score_threshold=0.0)
    assert len(found) == 2 and all(decode(s)[:, :4].all() for s in found)


def test_a_cropped_view_has_no_way_back() -> None:
    masks, _ = squares()
    with pytest.raises(ValueError, match="augmentation"):
        postprocess.to_original(masks, ViewGeometry((8, 8), (16, 16), 8, (4, 4)))
