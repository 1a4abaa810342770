"""The two pictures of an image: a small one for the language model and the square canvas of the mask branch."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from xseg.errors import UserError
from xseg.types import ImageViews, Size, ViewGeometry

LlmMode = Literal["squash", "pad_square"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)
PAD_COLOUR = (127, 127, 127)
"""SigLIP's mean as a colour; fills the square of ``pad_square``."""


@dataclass(frozen=True)
class ViewSizes:
    """How big the two views of a model are."""

    canvas: int
    """Side S of the mask view in pixels; 0 = the stage has no SAM, its views are (3, 0, 0)."""
    llm: int
    """Side s of the language model's view in pixels; 0 = the stage has no SigLIP."""
    llm_mode: LlmMode = "squash"

    def views(self, image: Image.Image, jitter_factor: float | None = None) -> ImageViews:
        """Make both views of an RGB image."""
        pixels, geometry = mask_view(image, self.canvas, jitter_factor)
        geometry = dataclasses.replace(geometry, squashed=self.llm_mode == "squash")
        return ImageViews(llm_view(image, self.llm, self.llm_mode), pixels, geometry)


def read_image(path: Path | Image.Image, where: str) -> Image.Image:
    """Decode an image file as RGB; an open image is converted. Stored orientation, as COCO annotates it.

    Raises UserError, naming ``where``, for a missing, truncated or foreign file, and for more than 8 bits a channel.
    """
    if isinstance(path, Image.Image):
        _check_depth(path, f"{where}: image")
        return path.convert("RGB")
    with _opened(path, where) as image:
        return image.convert("RGB")


def read_size(path: Path | Image.Image, where: str) -> Size:
    """Return (H, W) of an image from its header, nothing decoded. Raises UserError, naming ``where``, without one."""
    if isinstance(path, Image.Image):
        return path.height, path.width
    with _opened(path, where) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Image.Image]:
    """An image file that can become RGB; what is wrong with it, also while it is decoded, is a UserError."""
    try:
        with Image.open(path) as image:
            _check_depth(image, f"{where}: image {path}")
            yield image
    except FileNotFoundError as error:
        raise UserError(f"{where}: image {path} does not exist; check the recipe's image folder") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: image {path} cannot be decoded ({error}); fetch the file again") from error


def _check_depth(image: Image.Image, what: str) -> None:
    """UserError for wide numbers: Pillow cuts them off at 255, and nearly all of the picture would be plain white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        bits = 16 if image.mode.startswith("I;16") else 32
        raise UserError(
            f"{what}: {bits}-bit picture: mode {image.mode} does not fit into 8 bits and would be read as plain white; "
            "store it with 8 bits a channel"
        )


def llm_view(image: Image.Image, size: int, mode: LlmMode = "squash") -> np.ndarray:
    """The picture SigLIP reads: (3, size, size) float32 in [-1, 1], bicubic, equal to SiglipImageProcessor.

    "squash" ignores the aspect ratio; "pad_square" first centres the image on a grey square (X-SAM stage 2).
    ``size`` 0 gives (3, 0, 0).
    """
    if size == 0:
        return np.zeros((3, 0, 0), np.float32)
    if mode == "pad_square" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    out = np.empty((3, size, size), np.float32)
    _normalise(resized, out, SIGLIP_MEAN, SIGLIP_STD)
    return out


def mask_view(image: Image.Image, canvas: int, jitter_factor: float | None = None) -> tuple[np.ndarray, ViewGeometry]:
    """The picture SAM reads: (3, S, S) float32, ImageNet statistics, zeros below and right; and its geometry.

    The long side becomes S (round half up, bilinear), equal to SamImageProcessor. With ``jitter_factor`` (large-scale
    jitter of X-SAM stage 1, 0.1 to 2.0) it becomes factor * S, and what exceeds the canvas is cut off evenly on both
    sides. ``canvas`` 0 gives (3, 0, 0).
    """
    original = (image.height, image.width)
    if canvas == 0:
        return np.zeros((3, 0, 0), np.float32), ViewGeometry(original, (0, 0), 0)
    geometry = plan_view(original, canvas, jitter_factor)
    (height, width), (top, left) = geometry.scaled, geometry.offset
    out = np.zeros((3, canvas, canvas), np.float32)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    if max(height, width) > canvas:
        resized = resized.crop((left, top, min(left + canvas, width), min(top + canvas, height)))
    window = out[:, : min(canvas, height - top), : min(canvas, width - left)]
    _normalise(resized, window, IMAGENET_MEAN, IMAGENET_STD)
    return out, geometry


def plan_view(original: Size, canvas: int, jitter_factor: float | None = None) -> ViewGeometry:
    """The geometry ``mask_view`` uses for an image of ``original`` = (H, W) pixels."""
    long_side = canvas if jitter_factor is None else max(1, int(canvas * jitter_factor + 0.5))
    scale = long_side * 1.0 / max(original)
    height, width = (max(1, int(side * scale + 0.5)) for side in original)
    offset = (max(0, height - canvas) // 2, max(0, width - canvas) // 2)
    return ViewGeometry(original, (height, width), canvas, offset)


def _normalise(image: Image.Image, out: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write (pixel / 255 - mean) / std of an RGB image into ``out`` (3, h, w), without a float copy of the image."""
    for target, band, m, s in zip(out, image.split(), mean, std, strict=True):
        np.multiply(np.asarray(band), np.float32(1 / (255 * s)), out=target, dtype=np.float32)
        target -= np.float32(m / s)


def points_to_view(points_xy: np.ndarray, g: ViewGeometry) -> np.ndarray:
    """(n, 2) x, y in original pixels -> canvas pixels; pixel (row r, column c) is centred at c+.5, r+.5."""
    scale, shift = _affine(g)
    return np.asarray(points_xy, np.float64) * scale - shift


def points_from_view(points_xy: np.ndarray, g: ViewGeometry) -> np.ndarray:
    """Inverse of ``points_to_view``."""
    scale, shift = _affine(g)
    return (np.asarray(points_xy, np.float64) + shift) / scale


def _affine(g: ViewGeometry) -> tuple[np.ndarray, np.ndarray]:
    (full_h, full_w), (height, width) = g.original, g.scaled
    return np.array([width / full_w, height / full_h]), np.array([g.offset[1], g.offset[0]], np.float64)
