import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_stubs import LabelTask, ListSource, PhraseTask, PromptTask, TalkTask, WordEncoder, noise, phrase_sample

from xseg.data.collate import collate
from xseg.data.dataset import Dataset, Preparation
from xseg.data.loader import loader
from xseg.data.mixture import Plan
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.types import Batch, Encoded, EncodedQuery, EncodedText, ImageViews, Sample, Turn, ViewGeometry

READY = Preparation(WordEncoder(), ViewSizes(32, 14), seed=3)  # type: ignore[arg-type]


def encoded(sample: Sample, task: Any = None) -> Encoded:
    return Dataset(ListSource([sample]), task or PhraseTask(), READY).get(0)


def mixed() -> list[Encoded]:
    talk = Sample("t", (noise(9, 9),), turns=(Turn("user", "<image> hi there you"), Turn("assistant", "ho")))
    return [
        encoded(phrase_sample("a", (20, 30), ("left", "right"))),
        encoded(talk, TalkTask()),
        encoded(Sample("text", (), turns=(Turn("user", "hi"), Turn("assistant", "ho"))), TalkTask()),
        encoded(phrase_sample("p", (30, 20), ()), PromptTask()),
        encoded(phrase_sample("b", (20, 20), ("up",)), PhraseTask("own")),
        encoded(phrase_sample("c", (20, 20), ("over there",))),
    ]


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_a_mixed_batch_is_its_samples() -> None:
    samples = mixed()
    batch = collate(samples)
    assert batch.keys == ("a", "t", "text", "p", "b", "c")
    assert batch.image_slot[:, 0].tolist() == [0, 1, 3, 4, 5] and batch.image_slot[:, 2].tolist() == [0, 1, 2, 3, 4]
    for sample, position, image in batch.image_slot.tolist():
        assert batch.input_ids[sample, position] == -200
        assert batch.geometry[image] == samples[sample].images[0].geometry
        assert torch.equal(batch.mask_pixels[image], torch.from_numpy(samples[sample].images[0].mask))
        assert torch.equal(batch.llm_pixels[image], torch.from_numpy(samples[sample].images[0].llm))
    for row, sample in enumerate(samples):
        assert sample.text is not None
        n = len(sample.text.input_ids)
        assert batch.input_ids[row, :n].tolist() == sample.text.input_ids.tolist()
        assert batch.labels[row, :n].tolist() == sample.text.labels.tolist()
        assert batch.attention_mask[row].tolist() == [True] * n + [False] * (batch.input_ids.shape[1] - n)
        assert not batch.input_ids[row, n:].any() and (batch.labels[row, n:] == -100).all()
    assert batch.query_image.tolist() == [0, 0, 2, 3, 4] and batch.query_slot.tolist() == [0, 1, 0, 0, 0]
    assert batch.max_queries == 2
    assert all(batch.input_ids[s, p] == 1 for s, p in batch.seg_position.tolist())
    assert batch.seg_position[:, 0].tolist() == [0, 0, 3, 4, 5]
    for sample, start, end in batch.concept_span.tolist():
        assert batch.input_ids[sample, start] == 2 and batch.input_ids[sample, end - 1] == 3
    assert batch.region_position.tolist() == [[3, int(samples[3].text.regions[0])]]  # type: ignore[union-attr]
    assert batch.prompt_image.tolist() == [2] and batch.prompt_mask.shape == (1, 32, 32)
    assert torch.equal(batch.prompt_mask[0], batch.target_masks[2])


def test_only_queries_that_share_compete() -> None:
    batch = collate(mixed())
    # concepts: a: 0, 1; p: 2; b: 3; c: 4. a and c share their negatives, p and b keep to themselves.
    assert batch.query_concepts.tolist() == [[0, 1, 4], [0, 1, 4], [2, -1, -1], [3, -1, -1], [0, 1, 4]]
    assert batch.target_query.tolist() == [0, 1, 2, 3, 4] and batch.target_class.tolist() == [0, 1, 0, 0, 2]
    own = collate(
        [
            dataclasses.replace(s, queries=tuple(dataclasses.replace(q, negatives="own") for q in s.queries))
            for s in mixed()
        ]
    )
    assert own.query_concepts.tolist() == [[0], [1], [2], [3], [4]] and not own.target_class.any()


def test_a_batch_without_text_queries_or_images() -> None:
    stage1 = Preparation(None, ViewSizes(32, 0))
    data = Dataset(ListSource([phrase_sample("a", (20, 30), ()), phrase_sample("b", (9, 9), ())]), LabelTask(), stage1)
    batch = collate([data.get(0), data.get(1)])
    assert batch.input_ids.shape == (2, 0) and batch.query_concepts.shape == (2, 0)
    assert batch.llm_pixels.shape == (2, 3, 0, 0) and batch.seg_position.tolist() == [[-1, -1]] * 2
    assert batch.target_query.tolist() == [0, 0, 0, 1, 1, 1] and batch.target_class.tolist() == [0, 1, 2] * 2
    assert batch.target_masks.dtype == torch.uint8 and batch.ignore is None and batch.image_slot.shape == (0, 3)
    empty = collate([mixed()[2]])
    assert empty.max_queries == 0 and empty.target_masks.shape[0] == 0 and empty.query_concepts.shape == (0, 0)
    assert empty.mask_pixels.shape[:2] == (0, 3) and empty.concept_span.shape == (0, 3)


def test_ignored_pixels_of_one_query_leave_the_others_alone() -> None:
    plain = phrase_sample("a", (20, 30), ("left",))
    assert plain.masks is not None
    marked = dataclasses.replace(plain, ignore=plain.masks.rles[1])
    batch = collate([encoded(plain), encoded(marked)])
    assert batch.ignore is not None and not batch.ignore[0].any() and batch.ignore[1].any()


def golden(name: str) -> Path:
    root = os.environ.get("XSEG_GOLDEN")
    if not root or not (path := Path(root) / "archive" / name).is_file():
        pytest.skip("XSEG_GOLDEN is not set or lacks this case: outputs of the official code are not at hand")
    return path


def from_golden(case: Any) -> list[Encoded]:
    """The stored inputs of a referring case as encoded samples: one query per phrase."""
    out = []
    for row, ids in enumerate(case["in.input_ids"]):
        conds, segs = case["in.cond_ids"][row], case["in.seg_ids"][row]
        spans = [np.flatnonzero(conds == c)[[0, -1]] + [0, 1] for c in range(conds.max() + 1)]
        places = [np.flatnonzero(ids == value) for value in (-200, -300)]
        text = EncodedText(ids, case["in.labels"][row], np.stack(spans), np.flatnonzero(segs >= 0), *places)
        masks, classes = case[f"in.mask_labels.{row}"], case[f"in.class_labels.{row}"]
        queries = tuple(
            EncodedQuery(k, (k,), 0, masks[classes == k], np.zeros((classes == k).sum(), np.int64), "batch")
            for k in range(len(spans))
        )
        geometry = ViewGeometry((256, 256), (256, 256), 256)
        views = ImageViews(np.zeros((3, 56, 56), np.float32), np.zeros((3, 256, 256), np.float32), geometry)
        out.append(Encoded(str(row), text, (views,), queries))
    return out


@pytest.mark.parametrize("name", ["s3_refseg_loss_dense.npz", "s3_refseg_multi_loss_dense.npz"])
def test_referring_classes_are_places_in_the_flattened_batch(name: str) -> None:
    with np.load(golden(name)) as case:
        batch = collate(from_golden(case))
        used = [case[k].tolist() for k in sorted(k for k in case.files if k.startswith("tap.class_labels_used."))]
        width = case["tap.class_logits.0"].shape[-1]
    assert batch.query_concepts.shape[1] + 1 == width
    per_query = [batch.target_class[batch.target_query == q].tolist() for q in range(len(batch.query_image))]
    assert per_query == used
    assert batch.query_concepts.tolist() == [list(range(width - 1))] * (width - 1)


def datasets(broken: bool = False) -> list[Dataset]:
    sizes = ((20, 30), (25, 18))
    groups = [[phrase_sample(f"{d}/{i}", sizes[d], ("left", "right"), i) for i in range(5 + d)] for d in range(2)]
    if broken:
        groups[1][3] = dataclasses.replace(groups[1][3], images=(Path("no.jpg"),))
    return [Dataset(ListSource(group), PhraseTask(), READY) for group in groups]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_is_the_same_with_workers_and_after_a_resume(workers: int) -> None:
    data = datasets()
    plan = Plan([len(d) for d in data], [1.0, 2.0], batch_size=2, world=2, accumulate=2, seed=7)
    stop = plan.steps_per_epoch + 2
    whole = [list(loader(data, plan, rank, 0, stop)) for rank in range(2)]
    assert len(whole[0]) == stop and all(len(step) == 2 for step in whole[0])
    keys = [tuple(data[i.dataset].sample(i.sample).key for i in micro) for micro in plan.batch(1)[1]]
    assert [batch.keys for batch in whole[1][1]] == keys
    resumed = list(loader(data, plan, 1, 2, stop, num_workers=workers))
    assert len(resumed) == stop - 2
    for step, again in zip(whole[1][2:], resumed, strict=True):
        assert all(equal(a, b) for a, b in zip(step, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_s_user_error_arrives_as_it_was(workers: int) -> None:
    data = datasets(broken=True)
    plan = Plan([len(d) for d in data], [1.0, 1.0], batch_size=2)
    with pytest.raises(UserError) as caught:
        list(loader(data, plan, 0, 0, plan.steps_per_epoch, num_workers=workers))
    assert str(caught.value) == "1/3: image no.jpg does not exist; check the recipe's image folder"
