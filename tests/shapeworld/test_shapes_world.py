from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from xseg.data.shapeworld import world
from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.world import HELD_OUT_PAIRS, HELD_OUT_SHAPES, SPLITS, sample_scene, split_scene
from xseg.errors import UserError


@pytest.mark.parametrize("variant", ["easy", "hard"])
def test_a_scene_is_a_function_of_seed_and_index(variant: str) -> None:
    first, again = (sample_scene(3, 17, variant=variant) for _ in range(2))
    assert (first.things, first.ground, first.paint_seed) == (again.things, again.ground, again.paint_seed)
    assert np.array_equal(first.owner, again.owner)
    assert np.array_equal(draw(first), draw(again))
    assert not np.array_equal(draw(first), draw(sample_scene(3, 18, variant=variant)))
    assert not np.array_equal(draw(first), draw(sample_scene(4, 17, variant=variant)))


def test_splits_share_no_scene() -> None:
    starts = sorted(first for first, _ in SPLITS.values())
    assert all(b - a >= world.SPLIT_LENGTH for a, b in pairwise(starts))
    with pytest.raises(UserError, match="a split has"):
        split_scene(0, "train", world.SPLIT_LENGTH)
    with pytest.raises(UserError, match="did you mean 'val'"):
        split_scene(0, "vall", 0)


@pytest.mark.parametrize(("variant", "least", "most"), [("easy", 2, 6), ("hard", 5, 10)])
def test_everything_stays_visible(variant: str, least: int, most: int) -> None:
    for index in range(40):
        scene = sample_scene(1, index, side=96, variant=variant)
        assert least <= len(scene.things) <= most
        assert 2 <= len(scene.ground.names) <= 3
        assert set(np.unique(scene.owner)) == set(range(1, 1 + len(scene.ground.names) + len(scene.things)))
        for number, thing in enumerate(scene.things):
            _, distance = world.distance_field(thing, scene.side)
            assert scene.visible(number).sum() >= world.MIN_VISIBLE * (distance < 0).sum()


def test_the_near_hides_the_far_and_outlines_are_exact() -> None:
    overlaps = 0
    for index in range(30):
        scene = sample_scene(2, index, side=96)
        rows, columns = (np.indices(scene.owner.shape) + 0.5).reshape(2, *scene.owner.shape)
        seen = np.zeros(scene.owner.shape, bool)
        for number, thing in reversed(list(enumerate(scene.things))):
            x, y = columns - thing.x * 96, rows - thing.y * 96
            cos, sin, scale = np.cos(thing.angle), np.sin(thing.angle), thing.radius * 96
            field = world.SIGNED_DISTANCE[thing.shape]
            inside = field((x * cos + y * sin) / scale, (y * cos - x * sin) / scale) < 0
            assert np.array_equal(scene.visible(number), inside & ~seen)
            overlaps += bool((inside & seen).any())
            seen |= inside
    assert overlaps > 5


def test_masks_are_the_pixels_that_change_with_the_thing() -> None:
    for index in range(15):
        scene = sample_scene(5, index, side=96)
        before = draw(scene).astype(int)
        for number, thing in enumerate(scene.things):
            other = "white" if thing.colour == "black" else "black"
            things = tuple(replace(t, colour=other, texture="plain") if t is thing else t for t in scene.things)
            change = np.abs(draw(replace(scene, things=things)).astype(int) - before).max(axis=2)
            visible = scene.visible(number)
            grown = np.pad(visible, 1)
            near = np.max([np.roll(grown, s, (0, 1)) for s in np.ndindex(3, 3)], axis=0)[2:, 2:]
            # a rim can have the same shade in both colours, hence not every owned pixel changes
            assert (change[visible] > 10).mean() > 0.8
            if number == len(scene.things) - 1:  # nothing nearer that is half transparent at its outline
                assert change[~visible].max() <= 128
                assert (change[~near] > 0).sum() <= 4  # the tips of thin corners


def test_size_words_are_true() -> None:
    things = [t for i in range(60) for t in sample_scene(0, i).things]
    small, large = ([t.radius for t in things if t.size == s] for s in ("small", "large"))
    assert max(small) * 1.3 < min(large)


def test_held_out_things_appear_only_where_they_should() -> None:
    for index in range(80):
        scenes = {policy: sample_scene(7, index, side=64, policy=policy) for policy in ("seen", "open", "pairs")}
        pairs = {policy: {(t.colour, t.shape) for t in scene.things} for policy, scene in scenes.items()}
        assert not pairs["seen"] & set(HELD_OUT_PAIRS) and not pairs["open"] & set(HELD_OUT_PAIRS)
        assert pairs["pairs"] & set(HELD_OUT_PAIRS)
        shapes = {policy: {s for _, s in found} for policy, found in pairs.items()}
        assert not shapes["seen"] & set(HELD_OUT_SHAPES) and not shapes["pairs"] & set(HELD_OUT_SHAPES)
        assert shapes["open"] & set(HELD_OUT_SHAPES)


def test_too_small_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="at least 32"):
        sample_scene(0, 0, side=16)
