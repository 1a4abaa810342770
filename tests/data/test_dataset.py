import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import (
    LabelTask,
    ListSource,
    PhraseTask,
    PromptTask,
    TalkTask,
    WordEncoder,
    boxes,
    coco_file,
    noise,
    phrase_sample,
    real,
)

from xseg.config import DataRecipe, TaskSpec
from xseg.data.dataset import Dataset, Preparation, load_dataset, named
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import encode
from xseg.geometry.views import ViewSizes, mask_view, points_to_view
from xseg.types import Encoded, Instance, Masks, Phrase, Sample, Turn

READY = Preparation(WordEncoder(), ViewSizes(32, 14), seed=3)  # type: ignore[arg-type]


def arrays(value: Any) -> list[np.ndarray]:
    """Every array inside, in order."""
    if isinstance(value, np.ndarray):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    return [a for item in value for a in arrays(item)] if isinstance(value, list | tuple) else []


def same(a: Encoded, b: Encoded) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def source() -> ListSource:
    return ListSource([phrase_sample(f"x/{i}", (20 + i, 30), ("left", "right"), seed=i) for i in range(3)])


def test_a_sample_is_a_pure_function_of_seed_epoch_and_index() -> None:
    jittered = dataclasses.replace(READY, jitter=(0.4, 2.0))
    data = pickle.loads(pickle.dumps(Dataset(source(), PhraseTask(), jittered)))
    first = data.get(1, 4)
    data.get(0, 0)
    assert same(first, data.get(1, 4)) and same(first, Dataset(source(), PhraseTask(), jittered).get(1, 4))
    other = [data.get(1, 5), Dataset(source(), PhraseTask(), dataclasses.replace(jittered, seed=4)).get(1, 4)]
    for encoded in other:
        assert encoded.images[0].geometry.scaled != first.images[0].geometry.scaled
    words = {data.format(1, epoch).turns[0].text for epoch in range(20)}
    assert len(words) == 3
    alike = Dataset(ListSource([phrase_sample("x", (9, 9), ("left",))] * 20), PhraseTask(), READY)
    assert len({alike.format(index, 0).turns[0].text for index in range(20)}) == 3, "each sample has its own wording"
    assert data.format(1, 4) == Dataset(source(), PhraseTask(), READY).format(1, 4)


def test_everything_stands_where_it_belongs() -> None:
    encoded = Dataset(source(), PhraseTask(), READY).get(0)
    assert encoded.text is not None and encoded.key == "x/0"
    view = encoded.images[0]
    assert view.llm.shape == (3, 14, 14) and view.mask.shape == (3, 32, 32)
    assert (view.mask == mask_view(noise(20, 30, 0), 32)[0]).all()
    for k, query in enumerate(encoded.queries):
        assert (query.seg, query.concepts, query.classes.tolist()) == (k, (k,), [0])
        assert query.masks.shape == (1, 32, 32) and query.masks.dtype == np.uint8
        rows, columns = np.nonzero(boxes(20, 30)[k])
        xy = points_to_view(np.stack([columns + 0.5, rows + 0.5], 1), view.geometry).astype(int)
        assert query.masks[0, xy[:, 1], xy[:, 0]].all()


def test_shared_rows_are_placed_once_and_split_right() -> None:
    sample = phrase_sample("x", (20, 30), ("a", "b", "c"))
    sample = dataclasses.replace(sample, phrases=(Phrase("a", (2,)), Phrase("b", (0, 2)), Phrase("c")))
    queries = Dataset(ListSource([sample]), PhraseTask(), READY).get(0).queries
    assert [len(q.masks) for q in queries] == [1, 2, 0]
    assert (queries[0].masks[0] == queries[1].masks[1]).all() and not (queries[1].masks[0] == queries[1].masks[1]).all()


def test_targets_that_the_jitter_cuts_off_are_left_out() -> None:
    mask = np.zeros((2, 40, 40), np.uint8)
    mask[0, :3, :3] = 1
    mask[1, 18:22, 18:22] = 1
    sample = Sample(
        "x/corner",
        (noise(40, 40),),
        (40, 40),
        Masks((40, 40), tuple(encode(m) for m in mask)),
        (Instance(0, 4), Instance(1, 6)),
    )
    jittered = dataclasses.replace(READY, jitter=(1.9, 2.0))
    query = Dataset(ListSource([sample]), LabelTask(), jittered).get(0).queries[0]
    assert query.classes.tolist() == [6] and len(query.masks) == 1 and query.masks.any()


def test_without_text_without_siglip_without_image() -> None:
    stage1 = Preparation(None, ViewSizes(32, 0))
    encoded = Dataset(source(), LabelTask(), stage1).get(0)
    assert encoded.text is None and encoded.images[0].llm.shape == (3, 0, 0) and len(encoded.queries[0].masks) == 3
    with pytest.raises(UserError, match=r"x/0: .*no tokenizer"):
        Dataset(source(), PhraseTask(), stage1).get(0)
    talk = Sample("t/0", (), turns=(Turn("user", "hi"), Turn("assistant", "ho")))
    encoded = Dataset(ListSource([talk]), TalkTask(), READY).get(0)
    assert encoded.images == () and encoded.queries == () and encoded.text is not None


def test_a_stage_without_sam_has_empty_mask_views() -> None:
    encoded = Dataset(source(), PhraseTask(), dataclasses.replace(READY, views=ViewSizes(0, 14))).get(0)
    assert encoded.images[0].mask.shape == (3, 0, 0) and encoded.images[0].llm.shape == (3, 14, 14)
    assert [q.masks.shape for q in encoded.queries] == [(0, 0, 0), (0, 0, 0)]


def test_prompts_and_ignored_pixels_follow_the_view() -> None:
    sample = phrase_sample("x/0", (20, 30), ())
    assert sample.masks is not None
    sample = dataclasses.replace(sample, ignore=sample.masks.rles[1])
    encoded = Dataset(ListSource([sample]), PromptTask(), READY).get(0)
    (mask, image), query = encoded.prompts[0], encoded.queries[0]
    assert image == 0 and (mask == query.masks[0]).all()
    assert query.ignore is not None and query.ignore.any() and not (query.ignore & mask).any()


def test_every_error_carries_the_key(tmp_path: Path) -> None:
    sample = phrase_sample("refer/val/3", (20, 30), ("left",))
    missing = dataclasses.replace(sample, images=(tmp_path / "no.jpg",))
    other_size = dataclasses.replace(sample, images=(noise(30, 20),))
    two_tokens = dataclasses.replace(sample, turns=(Turn("user", "<image> <image> hi"), Turn("assistant", "ho")))
    for broken, task, message in (
        (missing, PhraseTask(), r"no\.jpg does not exist"),
        (other_size, PhraseTask(), r"is \[30, 20\] .*annotation says \[20, 30\]"),
        (two_tokens, TalkTask(), "2 image tokens for 1 images"),
    ):
        with pytest.raises(UserError, match=rf"refer/val/3.*{message}"):
            Dataset(ListSource([broken]), task, READY).get(0)
    with pytest.raises(KeyError) as caught, named("refer/val/3"):
        raise KeyError("bug")
    assert "refer/val/3" in caught.value.__notes__[0]
    with pytest.raises(IndexError):
        Dataset(source(), PhraseTask(), READY, limit=2).get(2)


def recipe(**changes: Any) -> DataRecipe:
    options = {"images": "pictures", "instances": "instances.json"}
    fields: dict[str, Any] = {"source": "coco", "options": options, "task": TaskSpec(name="conversation"), **changes}
    return DataRecipe(**fields)


def test_count_and_checksum_are_checked(tmp_path: Path) -> None:
    import hashlib

    coco_file(tmp_path)
    sha = hashlib.sha256((tmp_path / "instances.json").read_bytes()).hexdigest()
    data = load_dataset(recipe(count=2, sha256={"instances.json": sha}), root=tmp_path, preparation=READY, limit=1)
    assert len(data) == 1 and data.sample(0).image_id == 7
    for changes, message in (
        ({"count": 3}, "2 samples, the recipe states count: 3"),
        ({"sha256": {"instances.json": "0" * 64}}, "sha256"),
        ({"sha256": {"other.json": sha}}, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_dataset(recipe(**changes), root=tmp_path, preparation=READY)


def test_real_images_go_through() -> None:
    root = real("coco_mini")
    options = {"images": "val2017", "instances": "annotations/instances_val2017.json"}
    data = Dataset(load_source("coco", root, "val", options), LabelTask(), Preparation(None, ViewSizes(256, 0)))
    for index in range(0, 79, 13):
        encoded, sample = data.get(index), data.sample(index)
        wanted = [i.category for i in sample.instances if not i.is_crowd]
        found = encoded.queries[0].classes.tolist()
        assert len(found) <= len(wanted) and set(found) <= set(wanted)
        assert encoded.queries[0].masks.shape == (len(found), 256, 256)
    broken = json.loads((root / "annotations/instances_val2017.json").read_text())["images"][0]["file_name"]
    assert data.sample(0).images[0].name == broken  # type: ignore[union-attr]
