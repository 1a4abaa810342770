import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from xseg import config
from xseg.data.parallel import CHUNK
from xseg.data.shapeworld import write as writing
from xseg.data.shapeworld.board import square
from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.world import HELD_OUT_SHAPES, SEEN_SHAPES, split_scene
from xseg.data.shapeworld.write import write, write_splits
from xseg.data.sources import coco, llava, refer
from xseg.errors import UserError
from xseg.geometry.masks import decode, dense, from_json, read_id_map

RECIPES = Path(__file__).parents[2] / "data_recipes/shapes"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_splits(path / "shapes", 12, 8, 5, size=64)
    return path


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_pycocotools_reads_instances_and_they_are_the_scene(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = COCO(str(root / "shapes/train/instances.json"))
    assert len(data.getImgIds()) == 12
    for number in range(12):
        scene = split_scene(5, "train", number, side=64)
        rows = data.loadAnns(data.getAnnIds(imgIds=[number + 1]))
        assert len(rows) == len(scene.things)
        for thing, row in enumerate(rows):
            mask = data.annToMask(row)
            assert np.array_equal(mask, scene.visible(thing))
            assert mask.sum() == row["area"]
            x, y, w, h = row["bbox"]
            assert mask[y : y + h, x : x + w].sum() == mask.sum() and mask[y].any() and mask[:, x + w - 1].any()
            assert data.loadCats(row["category_id"])[0]["name"] == scene.things[thing].shape


def test_panoptic_files_are_standard_and_agree_with_the_scene(root: Path) -> None:
    folder = root / "shapes/val"
    data = json.loads((folder / "panoptic.json").read_text())
    names = {c["id"]: (c["name"], c["isthing"]) for c in data["categories"]}
    for number, record in enumerate(data["annotations"]):
        scene = split_scene(5, "val", number, side=64)
        id_map = read_id_map(folder / "panoptic" / record["file_name"])
        found = {int(i): int(n) for i, n in zip(*np.unique(id_map, return_counts=True), strict=True)}
        assert found == {s["id"]: s["area"] for s in record["segments_info"]}
        wanted = [(n, 0) for n in scene.ground.names] + [(t.shape, 1) for t in scene.things]
        assert [names[s["category_id"]] for s in record["segments_info"]] == wanted
        picture = np.asarray(Image.open(folder / "images" / record["file_name"]))
        assert np.array_equal(picture, draw(scene))


def test_references_name_the_right_masks(root: Path) -> None:
    folder = root / "shapes/train"
    rows = json.loads((folder / "refs.json").read_text())
    objects = {a["id"]: a for a in json.loads((folder / "instances.json").read_text())["annotations"]}
    assert [r["ref_id"] for r in rows] == list(range(len(rows)))
    sentences = [s["sent_id"] for r in rows for s in r["sentences"]]
    assert sorted(sentences) == list(range(len(sentences)))
    kinds: Counter[str] = Counter()
    for row in rows:
        kinds.update(s["kind"] for s in row["sentences"])
        nothing = {s["kind"] == "no-target" for s in row["sentences"]}
        assert nothing == {row["ann_id"] == []}
        told = {s["explanation"] for s in row["sentences"]}
        if not row["ann_id"]:
            assert told == {"nowhere."}
        if row["ann_id"]:
            target = objects[row["ann_id"]]
            assert (target["image_id"], target["category_id"]) == (row["image_id"], row["category_id"])
            words = {w for s in row["sentences"] if s["kind"] == "attribute" for w in s["tokens"]} & set(SEEN_SHAPES)
            scene = split_scene(5, "train", row["image_id"] - 1, side=64)
            thing = (target["id"] - 1) % 100
            assert words <= {scene.things[thing].shape} and told == {f"{square(scene.things[thing])}."}
            assert np.array_equal(decode(from_json(target["segmentation"])), scene.visible(thing))
    assert set(kinds) == {"attribute", "ordinal", "relation", "no-target"}


BASIC = ("panoptic", "refer", "talk", "captions")
"""What ``write`` makes recipes for; the rest is read in test_shapes_tasks."""


@pytest.mark.parametrize("name", sorted(p.stem for b in BASIC for p in RECIPES.glob(f"{b}_*.yaml")))
def test_recipes_read_what_is_written(root: Path, name: str) -> None:
    recipe = config.load_recipe(config.DataRecipe, str(RECIPES / f"{name}.yaml"))
    module = {"coco": coco, "refer": refer, "llava": llava}[recipe.source]
    source = module.Source(root, recipe.split, **recipe.options)
    images = {"train": 12, "val": 8, "overfit": 16}[recipe.split]
    samples = [source[i] for i in range(len(source))]
    assert len({s.image_id if recipe.source != "llava" else s.images[0] for s in samples}) == images
    for sample in samples:
        assert all(path.is_file() for path in sample.images)
        if sample.masks is not None and len(sample.masks):
            assert dense(sample.masks).any(axis=(1, 2)).all()
        if recipe.source == "llava":
            # six short answers and at most five places; equal expressions are asked once
            whole = {"shapes_talk": range(14, 23) if recipe.split == "train" else (2,), "shapes_captions": (10,)}
            assert len(sample.turns) in whole[recipe.options["name"]]
            assert sample.kind


def test_training_sees_nothing_that_is_held_out(root: Path) -> None:
    for split in ("train", "val", "overfit"):
        text = "".join(p.read_text() for p in (root / "shapes" / split).glob("*.json"))
        assert not [s for s in HELD_OUT_SHAPES if s in text]


def test_open_split_holds_the_held_out_shapes(tmp_path: Path) -> None:
    write(tmp_path / "open", 6, 0, size=64, split="val_open")
    data = json.loads((tmp_path / "open/panoptic.json").read_text())
    names = {c["id"]: c["name"] for c in data["categories"]}
    assert set(HELD_OUT_SHAPES) < set(names.values())
    for record in data["annotations"]:
        assert {names[s["category_id"]] for s in record["segments_info"]} & set(HELD_OUT_SHAPES)


def test_same_arguments_same_bytes_and_nothing_to_do_twice(root: Path, tmp_path: Path) -> None:
    write_splits(tmp_path / "again", 12, 8, 5, size=64)
    assert digest(tmp_path / "again") == digest(root / "shapes")
    calls: list[tuple[str, int, int]] = []
    write_splits(tmp_path / "again", 12, 8, 5, size=64, progress=lambda *c: calls.append(c))
    assert calls == []


def test_as_many_processes_as_one_likes_same_bytes(tmp_path: Path) -> None:
    for workers in (1, 2):
        write(tmp_path / f"{workers}", CHUNK + 8, 5, size=48, workers=workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "2")


def test_a_longer_split_begins_with_the_shorter_one(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "long", 14, 5, size=64)
    short, long = digest(root / "shapes/train"), digest(tmp_path / "long")
    pictures = [name for name in short if name.endswith(".png")]
    assert len(pictures) == 24 and all(short[p] == long[p] for p in pictures)


def test_another_data_set_is_not_overwritten(root: Path) -> None:
    before = digest(root / "shapes")
    with pytest.raises(UserError, match="images 12 instead of 13"):
        write(root / "shapes/train", 13, 5, size=64)
    with pytest.raises(UserError, match="holds no ShapeWorld"):
        write(root / "shapes/train/images", 12, 5, size=64)
    assert digest(root / "shapes") == before


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "shapes", 5, 0, size=64, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_bad_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 images"):
        write(tmp_path / "x", 0, 0)


def test_category_ids_are_unique() -> None:
    ids = [c["id"] for c in writing.categories("open")]
    assert len(set(ids)) == len(ids) == 15
