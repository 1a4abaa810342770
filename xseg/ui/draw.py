"""Masks on pictures: translucent colour, an outline, and a label where there is room."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from xseg.geometry import masks as rle
from xseg.geometry.prompts import window
from xseg.types import Segment

PALETTE = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
    (120, 94, 240),
)
"""Okabe and Ito's colours (the last one IBM's violet): told apart with any kind of colour vision."""
SMALLEST_SIDE = 320
"""Smaller pictures are enlarged to this long side before drawing, so that outlines and labels stay fine."""


def overlay(
    image: Image.Image, segments: Sequence[Segment], *, alpha: float = 0.45, labels: bool = True
) -> Image.Image:
    """Return the picture with every non-empty segment drawn on it; later segments lie on top.

    Equal labels share a colour unless every segment has the same one. Pictures whose long side is below
    ``SMALLEST_SIDE`` are enlarged by a whole factor, the masks with them.
    """
    scale = max(1, SMALLEST_SIDE // max(image.size))
    size = (image.width * scale, image.height * scale)
    pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.NEAREST), np.float32)
    width = max(1, round(max(size) / 300))
    drawn = []
    for segment, colour in zip(segments, colours(segments), strict=True):
        mask = rle.decode(segment.mask).astype(bool)
        if not mask.any():
            continue
        if mask.shape != (image.height, image.width):
            raise ValueError(f"mask of {mask.shape} on an image of {(image.height, image.width)}")
        large = mask.repeat(scale, axis=0).repeat(scale, axis=1)
        seen = window(large)
        part, large = pixels[seen], large[seen]
        part[large] = (1 - alpha) * part[large] + alpha * np.array(colour, np.float32)
        part[outline(large, width)] = colour
        drawn.append((segment, mask, colour))
    out = Image.fromarray(pixels.round().astype(np.uint8))
    for segment, mask, colour in drawn:
        if segment.label:
            _label(out, segment.label, mask, scale, colour)
    return out


def colours(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """One palette colour per segment: by label, or by place where all labels are the same."""
    names = list(dict.fromkeys(s.label for s in segments))
    if len(names) <= 1:
        return [PALETTE[k % len(PALETTE)] for k in range(len(segments))]
    return [PALETTE[names.index(s.label) % len(PALETTE)] for s in segments]


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a (H, W) bool mask within ``width`` of its border; the image's border counts."""
    inner = np.pad(mask, 1)
    for _ in range(width):
        core = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = np.pad(core, 1)
    return mask & ~inner[1:-1, 1:-1]


def _label(image: Image.Image, text: str, mask: np.ndarray, scale: int, colour: tuple[int, int, int]) -> None:
    """Write ``text`` on a plate of the segment's colour, centred on the pixel farthest from the mask's border.

    ``mask`` is that of the picture before it was enlarged by ``scale``.
    """
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, round(max(image.size) / 32)))
    text = text if len(text) <= 40 else text[:39] + "…"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 4
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = (k * scale + scale // 2 for k in np.unravel_index(int(np.argmax(depth)), mask.shape))
    x = int(np.clip(column - width / 2, 0, max(0, image.width - width)))
    y = int(np.clip(row - height / 2, 0, max(0, image.height - height)))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((x + 3 - left, y + 2 - top), text, fill=(0, 0, 0) if light else (255, 255, 255), font=font)
