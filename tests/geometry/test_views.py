from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xseg.errors import UserError
from xseg.geometry import views as V

SIDES = st.integers(3, 60)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES, st.sampled_from([32, 33, 64]))
def test_mask_view_equals_the_sam_processor(height: int, width: int, canvas: int) -> None:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    processor = SamImageProcessorPil(
        size={"longest_edge": canvas}, pad_size={"height": canvas, "width": canvas}, mask_pad_size=None
    )
    image = noise(height, width)
    theirs = processor(image, return_tensors="np")
    pixels, g = V.mask_view(image, canvas)
    assert pixels.dtype == np.float32 and pixels.shape == (3, canvas, canvas)
    assert np.abs(pixels - theirs["pixel_values"][0]).max() < 1e-5
    assert g.scaled == tuple(theirs["reshaped_input_sizes"][0]) and g.original == (height, width)


@settings(max_examples=20, deadline=None)
@given(SIDES, SIDES)
def test_llm_view_equals_the_siglip_processor(height: int, width: int) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = noise(height, width)
    theirs = SiglipImageProcessorPil(size={"height": 28, "width": 28})(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(V.llm_view(image, 28) - theirs).max() < 1e-5


def test_pad_square_centres_on_grey() -> None:
    out = V.llm_view(Image.new("RGB", (20, 10), (255, 255, 255)), 20, "pad_square")
    assert np.allclose(out[:, 5:15][:, 2:-2], 1, atol=1e-6)
    assert np.allclose(out[:, :3], 127 / 127.5 - 1, atol=1e-6) and np.allclose(out[:, -3:], 127 / 127.5 - 1, atol=1e-6)
    assert V.llm_view(noise(4, 4), 0).shape == (3, 0, 0)


def test_the_long_side_rounds_half_up() -> None:
    assert V.plan_view((3, 2), 1).scaled == (1, 1)
    assert V.plan_view((4, 10), 5).scaled == (2, 5)
    assert V.plan_view((5, 10), 5).scaled == (3, 5)
    assert V.plan_view((480, 640), 1024).scaled == (768, 1024)


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES, st.floats(0.1, 2))
def test_jitter_is_a_centred_window_of_the_larger_view(height: int, width: int, factor: float) -> None:
    image, canvas = noise(height, width), 32
    pixels, g = V.mask_view(image, canvas, factor)
    big, whole = V.mask_view(image, int(canvas * factor + 0.5))
    assert g.scaled == whole.scaled
    inner = big[:, : g.scaled[0], : g.scaled[1]]
    top, left = g.offset
    window = inner[:, top : top + canvas, left : left + canvas]
    assert (pixels[:, : window.shape[1], : window.shape[2]] == window).all()
    assert not pixels[:, window.shape[1] :].any() and not pixels[:, :, window.shape[2] :].any()
    for cut, side in zip(g.offset, g.scaled, strict=True):
        assert cut == max(0, side - canvas) // 2


@settings(max_examples=50, deadline=None)
@given(SIDES, SIDES, st.floats(0.1, 2), st.floats(0, 1), st.floats(0, 1))
def test_points_come_back(height: int, width: int, factor: float, u: float, v: float) -> None:
    g = V.plan_view((height, width), 64, factor)
    point = np.array([[u * width, v * height]])
    assert np.allclose(V.points_from_view(V.points_to_view(point, g), g), point, atol=1e-9)


def test_a_point_lands_on_the_same_object() -> None:
    from xseg.geometry.masks import encode, on_canvas
    from xseg.types import Masks

    mask = np.zeros((47, 81), np.uint8)
    mask[10:25, 30:61] = 1
    for factor in (None, 0.6, 1.7):
        g = V.plan_view((47, 81), 96, factor)
        placed = on_canvas(Masks((47, 81), rles=(encode(mask),)), (0,), g)[0]
        for x, y, inside in ((45.5, 17.5, 1), (33.0, 12.0, 1), (20.0, 17.0, 0), (45.0, 30.0, 0)):
            column, row = np.floor(V.points_to_view(np.array([[x, y]]), g)[0]).astype(int)
            assert placed[row, column] == inside


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refcoco/1.*does not exist"):
        V.read_image(tmp_path / "no.jpg", "refcoco/1")
    noise(64, 64).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(UserError, match=rf"refcoco/1.*{name}.*cannot be decoded"):
            V.read_image(tmp_path / name, "refcoco/1")
    assert V.read_image(Image.new("L", (3, 2)), "x").mode == "RGB"


@pytest.mark.parametrize(("mode", "bits"), [("I;16", 16), ("I", 32), ("F", 32)])
def test_a_deep_picture_is_refused_instead_of_read_as_white(tmp_path: Path, mode: str, bits: int) -> None:
    path = tmp_path / "deep.tif"
    deep = Image.fromarray(np.arange(600).reshape(20, 30).astype(np.int32)).convert(mode)
    deep.save(path)
    told = rf"{bits}-bit picture: mode {mode} .* store it with 8 bits a channel"
    for read in (V.read_image, V.read_size):
        with pytest.raises(UserError, match=rf"here: image .*deep\.tif: {told}"):
            read(path, "here")
    with pytest.raises(UserError, match=rf"here: image: {told}"):
        V.read_image(deep, "here")
