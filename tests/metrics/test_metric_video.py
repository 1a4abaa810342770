"""J and F by hand, and those of the DAVIS benchmark's own code on real predictions."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xseg.metrics import truth
from xseg.metrics.video import RegionAndOutline, edges, outline, region
from xseg.types import Instance, Masks, Phrase, Prediction, Sample, Segment

SIZE = (40, 40)


def block(top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def frame(clip: str, true: list[np.ndarray], found: list[np.ndarray]) -> tuple[Prediction, Sample]:
    masks = Masks(SIZE, tuple(truth.encode(m) for m in true))
    instances = tuple(Instance(k, -1, id=k + 1) for k in range(len(true)))
    phrases = tuple(Phrase("", (k,), str(k + 1)) for k in range(len(true)))
    sample = Sample("c", (), SIZE, masks, instances, None, phrases, kind=clip)
    return Prediction("c", tuple(Segment(truth.encode(m)) for m in found)), sample


def test_outlines_by_hand() -> None:
    assert edges(block(10, 10, 4)).sum() == 16  # 5 x 5 less the 3 x 3 inside
    assert region(block(10, 10, 4), block(10, 12, 4)) == pytest.approx(8 / 24)
    # the tolerance is one pixel here: of two 17-row columns far from each other nothing agrees but top and bottom
    assert outline(block(10, 10, 4), block(10, 11, 4)) == 1
    assert outline(block(10, 10, 16), block(10, 20, 16)) < 0.6
    assert outline(block(0, 0, 4), block(30, 30, 4)) == 0
    empty = np.zeros(SIZE, bool)
    assert (outline(empty, empty), outline(empty, block(1, 1, 4)), outline(block(1, 1, 4), empty)) == (1, 0, 0)
    assert region(empty, empty) == 1


def test_frames_of_an_object_weigh_as_one() -> None:
    right, wrong = block(10, 10, 8), block(30, 30, 8)
    metric = RegionAndOutline()
    for _ in range(3):
        metric.update(*frame("a", [right], [right]))
    metric.update(*frame("b", [right, wrong], [right]))  # its second object gets no mask
    got = {s.metric: s for s in metric.compute()}
    assert got["J"].value == got["F"].value == got["J&F"].value == pytest.approx(200 / 3)
    assert got["J"].n == 5 and "3 objects" in got["J"].protocol and got["J"].ci95 is not None
    left, other = RegionAndOutline(), RegionAndOutline()
    left.update(*frame("a", [right], [wrong]))
    other.update(*frame("a", [right], [right]))
    left += other
    assert [s.value for s in left.compute()] == [50, 50, 50] and RegionAndOutline().compute() == []


def test_pixels_that_do_not_count() -> None:
    prediction, sample = frame("a", [block(10, 10, 8)], [block(10, 10, 8) | block(30, 30, 8)])
    ignoring = Sample(**{**sample.__dict__, "ignore": truth.encode(block(29, 29, 10))})
    metric = RegionAndOutline()
    assert metric.update(prediction, sample)["J&F"] < 90
    assert metric.update(prediction, ignoring) == {"J&F": 100}


def test_equals_the_benchmark_on_real_clips() -> None:
    root = os.environ.get("XSEG_REAL")
    if not root:
        pytest.skip("XSEG_REAL is not set: real images and annotations are not at hand")
    folder = Path(root) / "davis16"
    expected = json.loads((folder / "expected_jf_official.json").read_text())
    compared = 0
    for clip, want in expected.items():
        if not isinstance(want, dict) or "J_per_frame" not in want:
            continue
        files = sorted((folder / "Annotations/480p" / clip).glob("*.png"))
        assert len(files) == want["frames"] == len(want["J_per_frame"])
        for file, j, f in zip(files, want["J_per_frame"], want["F_per_frame"], strict=True):
            true = np.asarray(Image.open(file).convert("L")) > 0
            [predicted] = (folder / "predictions_osvos").rglob(f"{clip}/{file.name}")
            found = np.asarray(Image.open(predicted)) > 0
            assert region(true, found) == pytest.approx(j, abs=1e-3), file
            assert outline(true, found) == pytest.approx(f, abs=1e-3), file
            compared += 1
    assert compared == 160
