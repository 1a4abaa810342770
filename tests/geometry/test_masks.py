import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as reference

from xseg.errors import UserError
from xseg.geometry import masks as M
from xseg.geometry.views import plan_view, points_to_view
from xseg.types import Masks, ViewGeometry

SIDES = st.integers(1, 41)


def random_mask(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((height, width)) < rng.random()).astype(np.uint8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES)
def test_rle_agrees_with_pycocotools_and_survives_json(seed: int, height: int, width: int) -> None:
    mask = random_mask(seed, height, width)
    rle = M.encode(mask)
    assert rle["counts"] == reference.encode(np.asfortranarray(mask))["counts"]
    assert M.area(rle) == mask.sum()
    assert (M.decode(M.from_json(M.to_json(rle))) == mask).all()
    assert M._runs(rle["counts"]).sum() == mask.size


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES)
def test_every_coco_form_gives_the_same_mask(seed: int, height: int, width: int) -> None:
    mask = random_mask(seed, height, width)
    rle = M.encode(mask)
    forms = [rle, M.to_json(rle), {"size": [height, width], "counts": M._runs(rle["counts"]).tolist()}]
    for form in forms:
        assert (M.decode(M.rle_from_segmentation(form, (height, width), "t")) == mask).all()


def test_polygons_agree_with_pycocotools_and_merge() -> None:
    polygons = [[1, 1, 8, 1, 8, 9, 1, 9], [10.5, 2.25, 17, 3, 14, 12], [0, 0, 3, 3]]
    ours = M.rle_from_segmentation(polygons, (15, 20), "t")
    theirs = reference.merge(reference.frPyObjects(polygons[:2], 15, 20))
    assert ours["counts"] == theirs["counts"]
    assert M.area(M.rle_from_segmentation([], (15, 20), "t")) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"size": [4, 5], "counts": [20]},
        {"size": [5, 4]},
        {"size": [5, 4], "counts": [3, 2]},
        {"size": [5, 4], "counts": [30, -10]},
        {"size": [5, 4], "counts": "zz"},
        {"size": [5, 4], "counts": ""},
        {"size": [5, 4], "counts": "01"},
        [[1, 1, 2, 2, 3]],
        [[1, 1, 2, 2, 3, float("nan")]],
        [[1, 1, 2, 2, 3, None]],
        "polygon",
        None,
    ],
)
def test_a_wrong_segmentation_is_named_with_its_place(bad: object) -> None:
    with pytest.raises(UserError, match=r"instances\.json image 7 annotation 3"):
        M.rle_from_segmentation(bad, (5, 4), "instances.json image 7 annotation 3")


def test_union_and_iou_by_hand() -> None:
    left, right = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    left[:, :3], right[:, 2:] = 1, 1
    a, b, nothing = M.encode_many(np.stack([left, right, np.zeros_like(left)]))
    assert M.area(M.union([a, b])) == 16
    assert M.iou(a, b) == 4 / 16
    assert M.iou(nothing, nothing) == 1 and M.iou(a, nothing) == 0


def test_id_map_round_trip_and_faults(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    ids = np.random.default_rng(0).integers(0, 1 << 24, (7, 5)).astype(np.int32)
    M.write_id_map(folder / "a.png", ids)
    assert (M.read_id_map(folder / "a.png") == ids).all()
    with pytest.raises(ValueError):
        M.write_id_map(folder / "b.png", ids + (1 << 24))
    with pytest.raises(UserError, match="no such panoptic PNG"):
        M.read_id_map(folder / "missing.png")
    Image.new("L", (3, 3)).save(folder / "grey.png")
    with pytest.raises(UserError, match="mode L"):
        M.read_id_map(folder / "grey.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        M.read_id_map(folder / "cut.png")


def two_forms(seed: int, height: int, width: int) -> tuple[Masks, Masks]:
    """The same partition of an image as an id map and as RLEs."""
    ids = np.random.default_rng(seed).choice(np.array([0, 3, 70000]), (height, width)).astype(np.int32)
    present = (3, 70000)
    rles = tuple(M.encode((ids == i).astype(np.uint8)) for i in present)
    return Masks((height, width), id_map=ids, ids=present), Masks((height, width), rles=rles)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, st.integers(8, 64))
def test_on_canvas_is_bit_equal_to_the_sam_processor(seed: int, height: int, width: int, canvas: int) -> None:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    as_map, as_rle = two_forms(seed, height, width)
    g = plan_view((height, width), canvas)
    ours = M.on_canvas(as_map, (1, 0), g)
    assert (M.on_canvas(as_rle, (1, 0), g) == ours).all()
    if min(g.scaled) < 1 or 0 in (round(side * canvas / max(height, width)) for side in (height, width)):
        return
    processor = SamImageProcessorPil(
        size={"longest_edge": canvas},
        mask_size={"longest_edge": canvas},
        pad_size={"height": canvas, "width": canvas},
        mask_pad_size={"height": canvas, "width": canvas},
    )
    image = Image.new("RGB", (width, height))
    for row, mask in enumerate(M.dense(as_map)[::-1]):
        theirs = processor(image, segmentation_maps=Image.fromarray(mask), return_tensors="np")["labels"][0]
        assert ours[row].dtype == np.uint8 and (ours[row] == theirs).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, st.integers(0, 3))
def test_mask_to_canvas_and_back_gives_the_mask(seed: int, height: int, width: int, extra: int) -> None:
    """Reading the canvas where each original pixel's centre lands gives the mask back, odd sizes included."""
    masks, _ = two_forms(seed, height, width)
    g = plan_view((height, width), 2 * max(height, width) + extra)
    rows, columns = np.mgrid[:height, :width]
    xy = points_to_view(np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1), g)
    column, row = np.floor(xy).astype(int).T
    back = M.on_canvas(masks, (0, 1), g)[:, row, column].reshape(2, height, width)
    assert (back == M.dense(masks)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, st.floats(0.1, 3))
def test_the_cropped_canvas_is_a_window_of_the_whole(seed: int, height: int, width: int, factor: float) -> None:
    masks, _ = two_forms(seed, height, width)
    g = plan_view((height, width), 24, factor)
    whole = M.on_canvas(masks, (0, 1), ViewGeometry(g.original, g.scaled, max(*g.scaled, 24) + 24))
    top, left = g.offset
    assert (M.on_canvas(masks, (0, 1), g) == whole[:, top : top + 24, left : left + 24]).all()


def test_row_rle_reads_both_forms() -> None:
    as_map, as_rle = two_forms(3, 9, 12)
    assert M.row_rle(as_map, 1)["counts"] == M.row_rle(as_rle, 1)["counts"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, st.integers(1, 20))
def test_many_overlapping_masks_stay_apart(seed: int, height: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    stack = (rng.random((count, height, width)) < 0.5).astype(np.uint8)
    masks, g = Masks((height, width), tuple(M.encode_many(stack))), plan_view((height, width), 30, 1.5)
    rows = rng.permutation(count).tolist()
    for placed, row in zip(M.on_canvas(masks, rows, g), rows, strict=True):
        alone = Image.fromarray(stack[row]).resize(g.scaled[::-1], Image.Resampling.NEAREST)
        (top, left), wanted = g.offset, np.zeros((30, 30), np.uint8)
        window = np.asarray(alone)[top : top + 30, left : left + 30]
        wanted[: window.shape[0], : window.shape[1]] = window
        assert (placed == wanted).all()
