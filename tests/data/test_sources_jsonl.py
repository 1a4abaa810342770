import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import boxes, noise, panoptic_file, real
from PIL import Image

from xseg.data.sources import load_source
from xseg.data.sources.jsonl import to_line
from xseg.errors import UserError
from xseg.geometry.masks import area, decode, dense, encode, row_rle, to_json
from xseg.types import Masks, Sample

MASKS = boxes(20, 31)
POLYGON = [[0, 0, 15, 0, 15, 10, 0, 10]]
OBJECTS = [
    {"segmentation": POLYGON, "category": "dog", "id": 5, "prompts": {"point": [4, 3], "box": [0, 0, 9, 9]}},
    {"segmentation": to_json(encode(MASKS[1])), "category": "cat", "prompts": {"scribble": [[20, 3], [28, 7]]}},
    {"segmentation": "third.png", "category": "grass", "crowd": True, "prompts": {"mask": POLYGON}},
]


def write(root: Path, *rows: Any, **options: Any) -> Any:
    noise(20, 31).save(root / "a.jpg")
    Image.fromarray(MASKS[2] * 255).save(root / "third.png")
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / "mine.jsonl").write_text(text + "\n")
    return load_source("jsonl", root, "train", {"jsonl": "mine.jsonl", **options})


def test_objects_with_every_form_of_mask_and_prompt(tmp_path: Path) -> None:
    source = write(tmp_path, {"image": "a.jpg", "objects": OBJECTS}, stuff=["grass"])
    (sample,) = source
    assert source.categories.names == ("dog", "cat", "grass") and source.categories.is_thing == (True, True, False)
    assert (sample.key, sample.size, sample.image_id) == ("jsonl/train/1", (20, 31), "a.jpg")
    assert [(i.category, i.id, i.is_crowd) for i in sample.instances] == [(0, 5, False), (1, 1, False), (2, 2, True)]
    found = dense(sample.masks)
    assert (found[1:] == MASKS[1:]).all() and np.abs(found[0].astype(int) - MASKS[0]).sum() <= 15
    prompts = [i.prompts for i in sample.instances]
    rows, columns = np.mgrid[:20, :31]
    assert (decode(prompts[0]["point"]) == (np.hypot(rows - 3, columns - 4) <= 10)).all()
    assert decode(prompts[0]["box"]).sum() == 81 == decode(prompts[0]["box"])[:9, :9].sum()
    assert decode(prompts[1]["scribble"])[[3, 5, 7], [20, 24, 28]].all() and area(prompts[2]["mask"]) == found[0].sum()


def test_every_task_in_one_line(tmp_path: Path) -> None:
    objects = [{"segmentation": POLYGON}, OBJECTS[1]]
    phrases = [
        {"text": " The left dog", "objects": [0], "explanation": "It is near.", "kind": "place"},
        {"text": "a zebra", "objects": []},
        {"text": "both", "objects": [1, 0], "id": "x"},
    ]
    turns = [{"role": "user", "text": "Who?"}, {"role": "assistant", "text": "A dog."}]
    source = write(
        tmp_path,
        {"image": "a.jpg", "objects": objects, "phrases": phrases, "kind": "k", "ignore": POLYGON},
        "",
        {"image": "a.jpg", "objects": objects, "caption": "<p>a dog</p> near <p>all</p>.", "spans": [[0], [0, 1]]},
        {"image": "a.jpg", "turns": turns, "id": "talk"},
        {"turns": turns},
        {"images": ["a.jpg", "a.jpg"], "turns": turns},
    )
    refer, caption, talk, text, two = source
    assert [(p.text, p.instances, p.explanation, p.kind, p.id) for p in refer.phrases] == [
        ("The left dog", (0,), "It is near.", "place", "1:0"),
        ("a zebra", (), "", "no-target", "1:1"),
        ("both", (1, 0), "", "", "x"),
    ]
    assert refer.kind == "k" and area(refer.ignore) == area(refer.masks.rles[0])
    assert caption.key == "jsonl/train/3" and caption.turns[0].role == "assistant"
    assert [(p.text, p.instances) for p in caption.phrases] == [("a dog", (0,)), ("all", (0, 1))]
    assert talk.key == "jsonl/train/talk" and [t.text for t in talk.turns] == ["Who?", "A dog."]
    assert text.images == () and text.masks is None and len(two.images) == 2


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    panoptic_file(tmp_path)
    options = {"images": "pictures", "panoptic_json": "panoptic.json"}
    coco = load_source("coco", tmp_path, "val", options)[0]
    told = tuple(dataclasses.replace(i, explanation=f"{k}.") for k, i in enumerate(coco.instances))
    coco = dataclasses.replace(coco, ignore=row_rle(coco.masks, 0), kind="k", instances=told)  # type: ignore[arg-type]
    assert coco.categories is not None
    source = write(tmp_path, to_line(coco, tmp_path), categories=list(coco.categories.names), stuff=["wall"])
    again = source[0]
    assert again.categories.names == coco.categories.names and again.categories.is_thing == coco.categories.is_thing
    assert (dense(again.masks) == dense(coco.masks)).all() and again.instances == coco.instances  # type: ignore[arg-type]
    assert again.images[0].resolve() == coco.images[0].resolve() and again.key == f"jsonl/train/{coco.key}"  # type: ignore[union-attr]
    assert again.ignore == coco.ignore and again.kind == "k"
    first = write(tmp_path, {"image": "a.jpg", "objects": OBJECTS[:1], "caption": "<p>é</p>", "spans": [[0]]})[0]
    second = write(tmp_path, to_line(first, tmp_path))[0]
    for name in ("turns", "instances", "size"):
        assert getattr(second, name) == getattr(first, name)
    assert isinstance(second.masks, Masks) and [p.text for p in second.phrases] == ["é"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "expected an object with keys"),
        ({"imagee": "a.jpg"}, "unknown key 'imagee'; did you mean 'image'"),
        ({"image": "a.jpg", "images": []}, "both 'image' and 'images'"),
        ({"objects": []}, "without an 'image'"),
        ({"image": "b.jpg", "objects": []}, r"image .*b\.jpg does not exist"),
        ({"image": "a.jpg", "size": [20], "objects": []}, r"size: \[20\] must be \[height, width\]"),
        ({"image": "a.jpg", "objects": [{}]}, r"objects\[0\]: key 'segmentation' is missing"),
        ({"image": "a.jpg", "objects": [{"segmentation": {"size": [2, 2], "counts": [4]}}]}, "mask of size"),
        ({"image": "a.jpg", "size": [9, 9], "objects": [OBJECTS[2]]}, r"third\.png is \[20, 31\]"),
        ({"image": "a.jpg", "objects": [{"segmentation": POLYGON, "prompts": {"box": [1, 2]}}]}, "box: .* must be"),
        ({"image": "a.jpg", "objects": [{"segmentation": POLYGON, "prompts": {"point": ["x"]}}]}, "point: .* must be"),
        ({"image": "a.jpg", "phrases": [{"text": "a", "objects": [0]}]}, r"phrases\[0\]: objects \[0\] must be"),
        ({"image": "a.jpg", "phrases": [{"text": "a"}]}, r"phrases\[0\]: key 'objects' is missing"),
        ({"image": "a.jpg", "caption": "<p>a</p> <p>b", "spans": [[], []]}, "2 <p> and 1 </p> in the caption, 2"),
        ({"image": "a.jpg", "caption": "<p>a</p>", "spans": []}, "1 <p> and 1 </p> in the caption, 0 entries"),
        ({"image": "a.jpg", "caption": "a", "spans": [], "phrases": []}, "one line holds one kind of text"),
        ({"image": "a.jpg", "spans": [[]]}, "'spans' without a 'caption'"),
        ({"turns": [{"role": "assistant", "text": "a"}]}, r"turns\[0\]: role 'assistant'"),
        ({"image": "a.jpg", "caption": "<p>a</p>", "spans": 3}, "'spans' is a int, it must be a list"),
        ({"images": 3, "turns": []}, "images: 3 must be names of files"),
        (
            {"image": "a.jpg", "phrases": [{"text": "a <region>", "objects": []}]},
            r"phrases\[0\]: text: .* holds <region>",
        ),
        ({"image": "a.jpg", "phrases": [{"text": "a <p>", "objects": []}]}, r"phrases\[0\]: text: .* holds <p>"),
        ({"image": "a.jpg", "phrases": [{"text": " ", "objects": []}]}, r"phrases\[0\]: text: ' ' has no words"),
        ({"image": "a.jpg", "phrases": [{"text": None, "objects": []}]}, r"phrases\[0\]: text: None must be a text"),
        ({"image": "a.jpg", "caption": "a <SEG>", "spans": []}, "caption: 'a <SEG>' holds <SEG>"),
        ({"turns": [{"role": "user", "text": None}]}, r"turns\[0\]: text: None must be a text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    source = write(tmp_path, {"turns": []}, row)
    with pytest.raises(UserError, match=rf"mine\.jsonl: line 2.*{message}"):
        source[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": ""}, "category: '' has no words"),
        ({"category": None}, "category: None must be a text"),
        ({"category": False}, "category: False must be a text"),
        ({"category": "a <SEG>"}, "category: 'a <SEG>' holds <SEG>"),
        ({"category": "<region>"}, "category: '<region>' holds <region>"),
        ({"crowd": "false"}, "crowd: 'false' must be true or false, without quotes"),
        ({"explanation": "<image> here"}, "explanation: '<image> here' holds <image>"),
        # a box from its far corner to its near one, and one of COCO's [x, y, width, height]
        ({"prompts": {"box": [28, 18, 14, 9]}}, r"box: \[28, 18, 14, 9\]: no pixel .* \[20, 31\] .*x1 < x2"),
        ({"prompts": {"box": [20, 3, 10, 8]}}, r"box: \[20, 3, 10, 8\]: no pixel .*no width or height"),
        ({"prompts": {"scribble": [[500, 500], [510, 505]]}}, "scribble: .*: no pixel of it lies in the image"),
        ({"prompts": {"point": [500, 500]}}, r"point: \[500, 500\]: no pixel of it lies in the image"),
        ({"prompts": {"mask": [[1, 1, 2, 2]]}}, "mask: .*: no pixel of it lies in the image"),
        ({"prompts": {"scribble": [[0, 0], [1e12, 0]]}}, "scribble: .* must be"),
        ({"prompts": {"point": [float("nan"), 3]}}, "point: .* must be"),
    ],
)
def test_a_wrong_object_is_named(tmp_path: Path, change: Any, message: str) -> None:
    source = write(tmp_path, {"image": "a.jpg", "objects": [{"segmentation": POLYGON, "category": "dog", **change}]})
    with pytest.raises(UserError, match=rf"mine\.jsonl: line 1: objects\[0\]: {message}"):
        source[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": [0, 1]}, "categories: 0 must be a name; put it in quotes"),
        ({"categories": [False, True]}, "categories: False must be a name; put it in quotes"),
        ({"categories": ["dog", "cat"], "stuff": [False]}, "stuff: False must be a name"),
        ({"categories": "dog"}, "categories: 'dog' must be a list of names"),
        ({"categories": ["dog", "cat", "dog"]}, "categories: 'dog' is there twice"),
        ({"categories": ["dog", ""]}, "categories: '' has no words"),
        ({"categories": ["<p>"]}, "categories: '<p>' holds <p>"),
    ],
)
def test_names_of_a_recipe_that_are_none(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, {"image": "a.jpg", "objects": OBJECTS[:1]}, **options)


def test_a_file_without_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.jsonl: no sample there"):
        write(tmp_path, "", " ")


def test_a_category_the_recipe_does_not_list(tmp_path: Path) -> None:
    source = write(tmp_path, {"image": "a.jpg", "objects": OBJECTS[:1]}, categories=["doge"])
    with pytest.raises(UserError, match=r"line 1: objects\[0\]: category 'dog' is not in the recipe; did you mean"):
        source[0]
    with pytest.raises(UserError, match="stuff: 'lawn' is no category"):
        write(tmp_path, {"turns": []}, categories=["grass"], stuff=["lawn"])
    with pytest.raises(UserError, match="no such annotation file"):
        load_source("jsonl", tmp_path, "train", {"jsonl": "no.jsonl"})


def test_real_samples_survive(tmp_path: Path) -> None:
    root = real("coco_panoptic")
    options = {
        "images": "input_images",
        "panoptic_json": "panoptic_examples.json",
        "panoptic_dir": "panoptic_examples",
    }
    coco = load_source("coco", root, "val", options)
    assert coco.categories is not None
    samples: list[Sample] = [coco[i] for i in range(len(coco))]
    (tmp_path / "real.jsonl").write_text("".join(to_line(s, tmp_path) + "\n" for s in samples))
    names = [n for n, t in zip(coco.categories.names, coco.categories.is_thing, strict=True) if not t]
    listed = {"categories": list(coco.categories.names), "stuff": names}
    again = load_source("jsonl", tmp_path, "val", {"jsonl": "real.jsonl", **listed})
    assert len(again) == len(samples) == 2
    for mine, theirs in zip(again, samples, strict=True):
        assert mine.instances == theirs.instances and mine.masks is not None and theirs.masks is not None
        assert (dense(mine.masks) == dense(theirs.masks)).all() and mine.images[0].is_file()  # type: ignore[union-attr]
