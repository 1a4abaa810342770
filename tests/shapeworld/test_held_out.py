"""Held-out shapes never come with a mask and never into a stage; held-out pairs of colour and shape come nowhere.

Their names may stand in the texts of the miniature language model and in the captions of the miniature SigLIP, as a
pretrained model would know them. Everything that is trained on is scanned: pictures, annotations and texts.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from xseg.config import DataRecipe, Mixture, load_recipe
from xseg.data.shapeworld.clips import film
from xseg.data.shapeworld.tasks import write_tasks
from xseg.data.shapeworld.world import HELD_OUT_PAIRS, HELD_OUT_SHAPES, SPLITS, VARIANTS, split_scene
from xseg.data.shapeworld.write import write

ROOT = Path(__file__).parents[2]
MIXTURES = sorted(p.stem for p in (ROOT / "data_recipes/mixtures").glob("shapes*.yaml"))
PAIR = re.compile("|".join(rf"{colour}( \w+)? {shape}" for colour, shape in HELD_OUT_PAIRS))
"""A pair in a sentence, a texture between its words or not."""
SHAPE = re.compile("|".join(HELD_OUT_SHAPES))


@pytest.fixture(scope="module")
def parts() -> dict[str, object]:
    """The scripts that train the parts."""
    sys.path.insert(0, str(ROOT / "examples/tiny_parts"))
    try:
        return {name: import_module(name) for name in ("phi", "phi_texts", "siglip", "sam")}
    finally:
        sys.path.pop(0)


def looks(scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in scene.things}


def test_the_patterns_find_what_they_look_for():
    assert PAIR.search("a large purple striped triangle") and PAIR.search("two yellow rings")
    assert not PAIR.search("a purple ring and a yellow triangle")
    assert SHAPE.search("three hearts")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_stages_train_on_splits_without_held_out_things(mixture):
    for entry in load_recipe(Mixture, mixture).datasets:
        recipe = load_recipe(DataRecipe, entry.recipe)
        assert SPLITS[recipe.split][1] == "seen", f"{entry.recipe} trains on split {recipe.split}"
        files = [str(v) for v in recipe.options.values()]
        assert not any("val" in Path(file).parts for file in files), f"{entry.recipe} reads {files}"


@pytest.mark.parametrize("split", ["train", "overfit"])
def test_no_file_of_a_training_split_holds_one(tmp_path, split):
    write(tmp_path / split, 150, 0, size=96, split=split)
    texts = [p for p in (tmp_path / split).glob("*.json") if p.name != "shapeworld.json"]
    assert {"captions.json", "instances.json", "panoptic.json", "refs.json", "talk.json"} == {p.name for p in texts}
    for path in texts:
        text = path.read_text(encoding="utf8")
        assert not SHAPE.search(text), path.name
        assert not PAIR.search(text), path.name
    listed = {c["name"] for c in json.loads((tmp_path / split / "panoptic.json").read_text())["categories"]}
    assert not listed & set(HELD_OUT_SHAPES)


def test_no_file_of_the_other_tasks_holds_one(tmp_path):
    write(tmp_path / "train", 150, 0, size=96)
    write_tasks(tmp_path / "train", 150)
    texts = [p for p in (tmp_path / "train/tasks").iterdir() if p.name != "shapeworld.json"]
    assert {"reason.jsonl", "gcg.json", "vgd.json", "interactive.jsonl"} == {p.name for p in texts}
    for path in texts:
        text = path.read_text(encoding="utf8")
        assert not SHAPE.search(text), path.name
        assert not PAIR.search(text), path.name
    seen = [thing for number in range(150) for thing in split_scene(0, "train", number, side=96).things]
    # one mask a thing, and the scenes hold no held-out thing: so no mask is one of theirs
    for name, count in (("vgd.json", '"visual_prompts"'), ("interactive.jsonl", '"prompts"')):
        assert (tmp_path / "train/tasks" / name).read_text(encoding="utf8").count(count) == len(seen)
    assert not {(thing.colour, thing.shape) for thing in seen} & set(HELD_OUT_PAIRS)
    assert not {thing.shape for thing in seen} & set(HELD_OUT_SHAPES)


def test_only_evaluation_shows_held_out_shapes(tmp_path):
    write(tmp_path / "val_open", 40, 0, size=96, split="val_open")
    shown = {shape for number in range(40) for _, shape in looks(split_scene(0, "val_open", number, side=96))}
    assert set(HELD_OUT_SHAPES) <= shown, "the scan sees them where they may be"
    users = [p for p in (ROOT / "data_recipes").rglob("*.yaml") if "val_open" in p.read_text(encoding="utf8")]
    assert [p.stem for p in users] == ["open_val"]
    mixed = " ".join(p.read_text(encoding="utf8") for p in (ROOT / "data_recipes/mixtures").glob("*.yaml"))
    stages = " ".join(p.read_text(encoding="utf8") for p in (ROOT / "train_stages").rglob("*.yaml"))
    assert "open_val" not in mixed + stages


def test_no_clip_holds_one():
    for number in range(100):
        found = {(thing.colour, thing.shape) for thing in film(0, number, side=48)[0].things}
        assert not found & set(HELD_OUT_PAIRS) and not {shape for _, shape in found} & set(HELD_OUT_SHAPES)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_scene_of_a_training_split_holds_one(variant):
    for number in range(600):
        found = looks(split_scene(0, "train", number, side=96, variant=variant))
        assert not found & set(HELD_OUT_PAIRS)
        assert not {shape for _, shape in found} & set(HELD_OUT_SHAPES)


def test_the_masks_of_sam_are_of_seen_shapes_alone(parts):
    sam = parts["sam"]
    for number in range(600):
        found = looks(split_scene(sam.SEED, "parts", number, side=sam.SIDE))
        assert not {shape for _, shape in found} & set(HELD_OUT_SHAPES)
        assert not found & set(HELD_OUT_PAIRS)


def test_texts_of_phi_hold_no_pair(parts):
    phi = parts["phi_texts"]
    shapes = set()
    for number in range(SPLITS["parts"][0], SPLITS["parts"][0] + 400):
        world, rng = phi.scene(number, ("easy", "hard")[number % 3 == 0]), np.random.default_rng(number)
        assert not looks(world) & set(HELD_OUT_PAIRS)
        for draw in (
            phi.look_ups,
            phi.everything,
            phi.grounds,
            phi.reads,
            phi.riddle_lines,
            phi.riddle_talk,
            phi.conversation,
        ):
            said = " | ".join(line for pair in draw(world, rng) for line in pair)
            assert not PAIR.search(said), said
        shapes |= set(SHAPE.findall(said))
    assert shapes == set(HELD_OUT_SHAPES), "the scan sees held-out shapes where they may be, so it looks at real texts"


def test_phi_reads_what_stands_on_each_square(parts):
    phi = parts["phi_texts"]
    orders = set()
    for number in range(30):
        world = phi.scene(number, "hard")
        told = {phi.square(thing): thing for thing in world.things}
        for question, answer in phi.reads(world, np.random.default_rng(number)):
            items = [item.split() for item in answer.split(", ")]
            name = question.removeprefix("every ")
            assert dict(items) == {place: getattr(thing, name) for place, thing in told.items()}
            orders.add(tuple(sorted(told).index(place) for place, _ in items))
    assert len(orders) > 100, "an order that could be known would make it a list to learn by heart"


def test_captions_of_siglip_hold_no_pair(parts):
    siglip = parts["siglip"]
    seen = []
    for number in range(400):
        scene = siglip.sample_scene(siglip.SEED, SPLITS["parts"][0] + number, side=96, policy="open")
        assert not looks(scene) & set(HELD_OUT_PAIRS)
        seen += [c.text() for c in siglip.claims(siglip.facts(scene), np.random.default_rng(number))]
    assert not [text for text in seen if PAIR.search(text)]
    assert any(SHAPE.search(text) for text in seen)


def test_the_parts_and_the_stages_share_no_scene(parts):
    seeds = {parts[name].SEED for name in parts}
    assert len(seeds) == 3 and 0 not in seeds
    assert SPLITS["parts"][0] + parts["phi"].PLAN.steps * parts["phi"].BATCH < parts["phi"].HELD_OUT
    assert SPLITS["parts"][0] + parts["siglip"].PLAN.steps * parts["siglip"].PICTURES < parts["siglip"].HELD_OUT
    assert parts["sam"].PLAN.steps * parts["sam"].IMAGES < parts["sam"].HELD_OUT
