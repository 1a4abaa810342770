from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xseg.data.shapeworld.clips import FRAMES, film, write_clips
from xseg.data.shapeworld.world import Scene, clip, distance_field
from xseg.data.sources import load_source
from xseg.errors import UserError


def seen(shots: list[Scene]) -> np.ndarray:
    """(frames, things) visible pixels."""
    return np.array([[shot.visible(k).sum() for k in range(len(shot.things))] for shot in shots])


@pytest.mark.parametrize("number", range(8))
def test_things_move_and_hide_one_another(number: int) -> None:
    shots = film(3, number, side=64)
    assert len(shots) == FRAMES
    first = shots[0]
    for before, after in pairwise(shots):
        for a, b, start in zip(before.things, after.things, first.things, strict=True):
            assert 0 < np.hypot(a.x - b.x, a.y - b.y) < 0.05, "all of them move, none jumps"
            assert (b.shape, b.colour, b.size, b.texture, b.radius) == (
                start.shape, start.colour, start.size, start.texture, start.radius,
            )  # fmt: skip
            assert 0.08 <= b.x <= 0.92 and 0.08 <= b.y <= 0.92
    counts = seen(shots)
    assert (counts.min(axis=0) < 0.75 * counts.max(axis=0)).any(), "something passes behind something"


def test_what_is_nearer_hides_what_is_farther() -> None:
    for number in range(8):
        for shot in film(3, number, side=64):
            near = shot.visible(len(shot.things) - 1)
            alone = outlined(shot)
            assert (near == alone).all(), "the nearest thing is never hidden"


def outlined(shot: Scene) -> np.ndarray:
    """The pixels inside the outline of the nearest thing."""
    out = np.zeros((shot.side, shot.side), bool)
    window, distance = distance_field(shot.things[-1], shot.side)
    out[window] = clip(distance, shot.things[-1], shot.side) < 0
    return out


def test_frames_and_masks_are_read_as_davis_ones(tmp_path: Path) -> None:
    write_clips(tmp_path / "a", 2, 5, size=64)
    source = load_source("frames", tmp_path, "clips", {"frames": "a/frames", "masks": "a/masks"})
    assert len(source) == 2 * FRAMES
    for index in range(len(source)):
        sample = source[index]
        clip, frame = divmod(index, FRAMES)
        shot = film(5, clip, side=64)[frame]
        assert sample.kind == f"{clip:05d}" and sample.images[0].is_file()
        ids = {i.id for i in sample.instances}
        assert ids == {k + 1 for k in range(len(shot.things)) if shot.visible(k).any()}
        assert sample.masks is not None and sample.masks.id_map is not None
        assert all(((sample.masks.id_map == i) == shot.visible(i - 1)).all() for i in ids)
        assert Image.open(sample.images[0]).size == (64, 64)


def test_same_arguments_same_bytes_and_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_clips(tmp_path / name, 1, seed, size=64)
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.suffix in (".png", ".jpg")) for n in "abc"]
    a, b, c = ([p.read_bytes() for p in found] for found in files)
    assert len(a) == 2 * FRAMES and a == b != c
    with pytest.raises(UserError, match="seed 5 instead of 6"):
        write_clips(tmp_path / "a", 1, 6, size=64)
    with pytest.raises(UserError, match="0 clips"):
        write_clips(tmp_path / "d", 0, 6)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clips(tmp_path / "e", 1, 5, size=64, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
