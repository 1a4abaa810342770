import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from xseg.geometry import strokes
from xseg.geometry.prompts import KINDS, draw, from_box, from_path, from_points, widen


def blob(shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return ((rows - 60) / 30.0) ** 2 + ((columns - 80) / 45.0) ** 2 < 1


def test_every_kind_is_drawn_where_the_object_is() -> None:
    mask = blob()
    for seed in range(30):
        drawn = draw(mask, np.random.default_rng(seed))
        assert tuple(drawn) == KINDS and all(p.any() and p.dtype == bool for p in drawn.values())
        assert drawn["point"].sum() == 1 and mask[drawn["point"]].all()
        box = np.argwhere(drawn["box"])
        height, width = box.max(0) - box.min(0) + 1
        assert 0.9 * 59 - 1 <= height <= 1.1 * 61 + 1 and 0.9 * 89 - 1 <= width <= 1.1 * 91 + 1
        assert drawn["box"].sum() == height * width, "a box is filled"
        rough = drawn["mask"]
        assert (mask & ~rough).sum() < 0.02 * mask.sum()
        assert not rough[ndimage.distance_transform_edt(~mask) > 9].any(), "the blur ends after four sigma"
        reach = np.ptp(np.argwhere(drawn["scribble"]), axis=0)
        assert reach[1] >= 0.4 * 90 and (drawn["scribble"] & ndimage.binary_dilation(mask, iterations=20)).any()


def test_seeds_decide_and_nothing_else() -> None:
    first, again, other = (draw(blob(), np.random.default_rng(s)) for s in (1, 1, 2))
    assert all((first[k] == again[k]).all() for k in KINDS)
    assert any((first[k] != other[k]).any() for k in KINDS)


def test_parts_are_united_and_specks_are_left_out() -> None:
    mask = np.zeros((60, 100), np.uint8)
    mask[5:25, 5:25] = mask[30:55, 60:95] = 1
    mask[58, 0:5] = 1  # five pixels: not more than five
    drawn = draw(mask, np.random.default_rng(0))
    assert drawn["point"].sum() == 2 and drawn["point"][:28, :40].any() and drawn["point"][28:, 50:].any()
    assert ndimage.label(drawn["box"])[1] == 2 and not drawn["box"][57:, :20].any()
    mask[:57] = 0
    assert draw(mask, np.random.default_rng(0)) == {}


def test_a_ring_is_clicked_on_its_band() -> None:
    rows, columns = np.mgrid[:101, :101]
    radius = np.hypot(rows - 50, columns - 50)
    ring = (radius > 48) & (radius < 49.5)
    for seed in range(5):
        assert ring[draw(ring, np.random.default_rng(seed))["point"]].all()


def test_widening_is_a_disc_and_changes_only_thin_kinds() -> None:
    dot = from_points((50, 60), [[30.7, 25.2]])
    assert np.argwhere(dot).tolist() == [[25, 30]]
    rows, columns = np.mgrid[:50, :60]
    assert (widen("point", dot) == (np.hypot(rows - 25, columns - 30) <= 10)).all()
    assert (widen("scribble", dot) == (np.hypot(rows - 25, columns - 30) <= 5)).all()
    assert (widen("box", dot) == dot).all() and not widen("point", np.zeros((5, 5), bool)).any()


@pytest.mark.parametrize(
    ("made", "pixels"),
    [
        (from_points((4, 5), [[-1, 2], [4.9, 3.9], [5, 0]]), [[3, 4]]),
        (from_path((4, 5), [[0, 0], [3, 3]]), [[0, 0], [1, 1], [2, 2], [3, 3]]),
        (from_path((4, 5), [[2, 1]]), [[1, 2]]),
        (from_box((4, 5), [1, 2, 3, 9]), [[2, 1], [2, 2], [3, 1], [3, 2]]),
    ],
)
def test_a_user_s_own(made: np.ndarray, pixels: list[list[int]]) -> None:
    assert np.argwhere(made).tolist() == pixels


def test_a_stroke_far_outside_costs_no_more_than_its_picture() -> None:
    size = (30, 40)
    diagonal = from_path(size, [(0, 0), (1e9, 1e9)])
    assert (diagonal == np.eye(*size, dtype=bool)).all()
    across = from_path(size, [(-1e12, 7.5), (1e12, 7.5), (20.5, 1e11)])
    assert across[7].all() and not across[:7].any() and not across[8:, :20].any()
    for missing in ([(1e9, -50), (1e9, 1e9)], [(-1e9, 20), (20, -1e9)], [(-500, -1e9), (-500, 1e9)]):
        assert not from_path(size, missing).any()


def test_strokes_near_the_picture_are_the_lines_they_were() -> None:
    rng = np.random.default_rng(0)
    for number in range(300):
        path = rng.uniform(-60, 100, (6, 2))
        if number % 3:  # on pixels' borders and centres the last bit decides, and lines run along an axis or nowhere
            path = np.floor(path[[0, 0, 1, 2, 3, 4]] / 8) + (0.5 if number % 3 == 1 else 0)
        steps = np.ceil(np.abs(np.diff(path, axis=0)).max(1)).astype(int) + 1
        rows = [np.linspace(a, b, n) for a, b, n in zip(path[:-1], path[1:], steps, strict=True)]
        assert (from_path((30, 40), path.tolist()) == from_points((30, 40), np.concatenate(rows).tolist())).all()


def plain_polygon(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The polygon by the hull of every pixel."""
    points = np.argwhere(mask)[:, ::-1]
    try:
        outline = points[ConvexHull(points).vertices]
    except (QhullError, ValueError):
        return mask
    corners = min(strokes.CORNERS, len(outline))
    kept = outline[np.linspace(0, len(outline), corners, endpoint=False).astype(int)]
    return strokes.filled(mask.shape, kept + rng.normal(0, strokes.SHAKE * np.ptp(points, axis=0).max(), kept.shape))


def test_a_polygon_is_that_of_all_pixels() -> None:
    for number in range(200):
        rng = np.random.default_rng(number)
        blurred = ndimage.gaussian_filter(rng.normal(size=(30, 40)), rng.uniform(0.5, 4))
        mask = blurred >= np.quantile(blurred, rng.uniform(0.5, 1))  # from half of the picture to a pixel
        if number % 2:
            mask = mask.repeat(7, 0).repeat(7, 1)
        found = strokes.polygon(mask, np.random.default_rng(1))
        assert (found == plain_polygon(mask, np.random.default_rng(1))).all()
