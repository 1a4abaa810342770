import numpy as np
import pytest
from PIL import Image

from xseg.geometry.masks import encode
from xseg.types import Segment
from xseg.ui.draw import PALETTE, colours, outline, overlay


def segment(mask: np.ndarray, label: str = "") -> Segment:
    return Segment(encode(mask.astype(np.uint8)), label=label)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (500, 400)])
def test_any_size_is_drawn_and_only_the_mask_changes(size: tuple[int, int]) -> None:
    mask = np.zeros(size, bool)
    mask[: max(1, size[0] // 2)] = True
    image = Image.new("RGB", (size[1], size[0]), (10, 20, 30))
    out = overlay(image, [segment(mask)])
    scale = out.height // size[0]
    pixels = np.asarray(out)
    big = mask.repeat(scale, 0).repeat(scale, 1)
    assert pixels.shape[:2] == big.shape and max(out.size) >= min(320, scale * max(size))
    assert (pixels[~big] == (10, 20, 30)).all() and (pixels[big] != (10, 20, 30)).any(axis=-1).all()


def test_empty_masks_draw_nothing_and_wrong_sizes_are_an_error() -> None:
    image = Image.new("RGB", (400, 300))
    assert overlay(image, [segment(np.zeros((300, 400)), "absent")]).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="mask of"):
        overlay(image, [segment(np.ones((300, 300)))])


def test_outline_is_the_rim() -> None:
    mask = np.zeros((10, 10), bool)
    mask[2:8, 2:8] = True
    assert outline(mask, 1).sum() == 20 and outline(mask, 3).sum() == 36
    assert not outline(mask, 1)[~mask].any()


def test_labels_share_colours() -> None:
    one = np.ones((2, 2))
    assert colours([segment(one, "a"), segment(one, "b"), segment(one, "a")]) == [PALETTE[0], PALETTE[1], PALETTE[0]]
    assert len(set(colours([segment(one, "a")] * 3))) == 3
    assert len(set(PALETTE)) == len(PALETTE)
