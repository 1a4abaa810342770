import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from xseg import config
from xseg.data.lint import lint
from xseg.data.shapeworld.board import square
from xseg.data.shapeworld.pointing import KINDS, point_at
from xseg.data.shapeworld.tasks import write_all, write_tasks
from xseg.data.shapeworld.world import HELD_OUT_SHAPES, sample_scene, split_scene
from xseg.data.shapeworld.write import write, write_splits
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import decode, dense
from xseg.types import Sample

RECIPES = Path(__file__).parents[2] / "data_recipes/shapes"
NEW = ["reason_train", "reason_val", "gcg_train", "gcg_val", "vgd_train", "vgd_val", "vgd_cross_val"]
NEW += ["interactive_train", "interactive_val", "open_val", "clips_val"]
TRAIN, VAL = 10, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_splits(path / "shapes", TRAIN + 2, VAL, 5, size=64)
    write_all(path / "shapes", TRAIN)
    return path


def samples(root: Path, name: str) -> list[Sample]:
    recipe = config.load_recipe(config.DataRecipe, f"shapes/{name}")
    source = load_source(recipe.source, root, recipe.split, recipe.options)
    return [source[i] for i in range(len(source))]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", NEW)
def test_recipes_read_what_is_written(root: Path, name: str) -> None:
    found = samples(root, name)
    assert found and len({s.key for s in found}) == len(found)
    for sample in found:
        assert all(path.is_file() for path in sample.images)
        assert sample.masks is not None and dense(sample.masks).any(axis=(1, 2)).all()


def test_a_clean_corpus_has_no_fault(root: Path) -> None:
    names = [f"shapes/{name}" for name in (*NEW, "panoptic_train", "panoptic_val")]
    reports, leaks = lint({n: config.load_recipe(config.DataRecipe, n) for n in names}, root)
    assert [f.text for r in reports for f in r.faults] == [] == [f.text for f in leaks]


def test_masks_are_those_of_the_scene(root: Path) -> None:
    for name, split in (("reason_train", "train"), ("interactive_train", "train"), ("vgd_val", "val")):
        for sample in samples(root, name):
            number = int(Path(str(sample.images[0])).stem)
            scene = split_scene(5, split, number - 1, side=64)
            masks = dense(sample.masks)
            assert len(masks) == len(scene.things)
            assert all((mask == scene.visible(k)).all() for k, mask in enumerate(masks))
            squares = [square(thing) for thing in scene.things]
            assert all(p.explanation.endswith(f" {squares[p.instances[0]]}.") for p in sample.phrases)
            if name == "interactive_train":
                assert [i.explanation for i in sample.instances] == [f"{s}." for s in squares]
            if sample.categories:
                assert [sample.categories.names[i.category] for i in sample.instances] == [
                    t.shape for t in scene.things
                ]


def test_training_has_pictures_and_evaluation_questions(root: Path) -> None:
    assert len(samples(root, "interactive_train")) == TRAIN
    per_object = samples(root, "interactive_val")
    assert len(per_object) == sum(len(split_scene(5, "val", i, side=64).things) for i in range(VAL))
    assert all(len(s.instances) == 1 and set(s.instances[0].prompts) == set(KINDS) for s in per_object)
    assert all(len(s.phrases) == 1 and len(s.instances) > 1 for s in samples(root, "reason_val"))
    assert {p.kind for s in samples(root, "reason_train") for p in s.phrases} == {"short", "long"}


def test_captions_have_several_masks_where_there_are_several_things(root: Path) -> None:
    found = samples(root, "gcg_train")
    assert len(found) == TRAIN
    counts = {len(p.instances) for s in found for p in s.phrases}
    assert 1 in counts and max(counts) > 1
    for sample in found:
        assert sample.turns[0].text.count("<p>") == len(sample.phrases)
        assert (dense(sample.masks).sum(axis=0) == 1).all(), "things and grounds share the picture"


def test_prompts_point_at_their_own_thing() -> None:
    inside = dict.fromkeys(KINDS, 0.0)
    count = 0
    for number in range(25):
        scene = sample_scene(7, number, side=96)
        for thing in range(len(scene.things)):
            prompts = point_at(scene, thing, np.random.default_rng([number, thing]))
            assert tuple(prompts) == KINDS
            mask, grounds = scene.visible(thing), len(scene.ground.names)
            count += 1
            for kind, prompt in prompts.items():
                owners = scene.owner[prompt & (scene.owner > grounds)]
                assert prompt.any() and np.bincount(owners).argmax() == grounds + 1 + thing, kind
                inside[kind] += (prompt & mask).sum() / mask.sum()
    covered = {kind: part / count for kind, part in inside.items()}
    assert covered["point"] < 0.1 < covered["polygon"] and covered["box"] > 0.8 and covered["mask"] > 0.9
    assert covered["point"] < covered["scribble"] < covered["box"]


def test_open_pictures_hold_what_training_never_shows(root: Path) -> None:
    for sample in samples(root, "open_val"):
        assert sample.categories is not None and set(HELD_OUT_SHAPES) < set(sample.categories.names)
        assert {sample.categories.names[i.category] for i in sample.instances} & set(HELD_OUT_SHAPES)


def test_same_bytes_however_many_work_and_nothing_to_do_twice(root: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        write(tmp_path / name, 40, 5, size=48)
        write_tasks(tmp_path / name, 40, workers=workers)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    calls: list[tuple[int, int]] = []
    write_tasks(tmp_path / "one", 40, progress=lambda *c: calls.append(c))
    assert calls == []
    first = (root / "shapes/train/tasks/vgd.json").read_text()
    write(tmp_path / "again", TRAIN + 2, 5, size=64)
    write_tasks(tmp_path / "again", TRAIN)
    assert (tmp_path / "again/tasks/vgd.json").read_text() == first and len(json.loads(first)) == TRAIN


def test_more_pictures_than_there_are_means_all(tmp_path: Path) -> None:
    write(tmp_path / "s", 3, 0, size=48)
    write_tasks(tmp_path / "s", 1000)
    assert len(json.loads((tmp_path / "s/tasks/gcg.json").read_text())) == 3


def test_mistakes_are_named_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no ShapeWorld"):
        write_all(tmp_path, 10)
    write(tmp_path / "s", 3, 0, size=48)
    with pytest.raises(UserError, match="at least 1"):
        write_tasks(tmp_path / "s", 0)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tasks(tmp_path / "s", 3, progress=stop)
    assert not (tmp_path / "s/tasks").exists() and not list((tmp_path / "s").glob(".tasks*"))
    write_tasks(tmp_path / "s", 2)
    with pytest.raises(UserError, match="images 2 instead of 3"):
        write_tasks(tmp_path / "s", 3)


def test_prompts_of_the_source_are_those_that_were_drawn(root: Path) -> None:
    scene = split_scene(5, "train", 0, side=64)
    sample = samples(root, "vgd_train")[0]
    rng = np.random.default_rng([5, 0, 4])
    for k, instance in enumerate(sample.instances):
        drawn = point_at(scene, k, rng)
        assert set(instance.prompts) == {"point", "scribble", "box", "mask"}
        assert all((decode(rle).astype(bool) == drawn[kind]).all() for kind, rle in instance.prompts.items())
