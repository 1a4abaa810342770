"""Visual prompts as rows of the language model, from points inside the prompt (X-SAM section 3.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xseg.types import ViewGeometry


def sample_regions(
    cells: Tensor,
    image: Tensor,
    masks: Tensor,
    points: int = 256,
    ranks: Tensor | None = None,
    *,
    rows: int = 1,
    views: Sequence[ViewGeometry] | None = None,
    covered: float = 1.0,
) -> Tensor:
    """Projected cells (I, h, w, D), prompts (P, S, S) uint8 on images (P,) -> (P, rows, D).

    The cells are a map of the canvas (SAM's), or, with the ``views`` of the I images, of what the language model sees
    of them, of whose side they cover the first part, ``covered`` (SigLIP's). One row is the maximum over all points
    (the paper); more are the means of as many runs of points, one after the other (branch main: 64 of 4 points each).
    ``ranks`` (P, points) choose among a prompt's pixels in reading order; by default they are spread evenly, so that
    the rows of a prompt are always the same. An empty prompt gives zero rows.
    """
    inside = masks.flatten(1) > 0
    count = inside.sum(1, keepdim=True)
    if ranks is None:
        steps = (torch.arange(points, device=masks.device, dtype=torch.float64) + 0.5) / points
        ranks = (steps * count).long()
    running = inside.cumsum(1, dtype=torch.int32)
    pixel = torch.searchsorted(running, ranks.to(torch.int32) + 1).clamp(max=inside.shape[1] - 1)
    side = masks.shape[-1]
    xy = torch.stack((pixel % side, pixel // side), -1).float()
    maps = cells.permute(0, 3, 1, 2).float()[image]
    if views is None:
        # X-SAM's points: 0 and 1 are the middles of the first and the last cell
        found = F.grid_sample(maps, 2 * (xy / side)[:, None] - 1, padding_mode="zeros", align_corners=True)
    else:
        xy = on_image((xy + 0.5) / side, image, views) / covered
        found = F.grid_sample(maps, 2 * xy[:, None] - 1, padding_mode="border", align_corners=False)
    runs = found[:, :, 0].transpose(1, 2).unflatten(1, (rows, -1))
    pooled = runs.amax(2) if rows == 1 else runs.mean(2)
    return torch.where(count[:, None] > 0, pooled, 0.0).to(cells.dtype)


def on_image(xy: Tensor, image: Tensor, views: Sequence[ViewGeometry]) -> Tensor:
    """(P, n, 2) x, y in 0..1 of the canvas -> of what the language model sees of the images (P,); ``views`` of all."""
    canvas, offset, scaled, share = (t[image, None] for t in _affine(xy, views))
    return ((xy * canvas + offset) / scaled - 0.5) * share + 0.5


def on_canvas(xy: Tensor, views: Sequence[ViewGeometry]) -> Tensor:
    """Inverse of ``on_image``: (n, 2) x, y of what the language model sees -> (I, n, 2) of the canvas of each image."""
    canvas, offset, scaled, share = (t[:, None] for t in _affine(xy, views))
    return (((xy - 0.5) / share + 0.5) * scaled - offset) / canvas


def _affine(like: Tensor, views: Sequence[ViewGeometry]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y of every view: side of the canvas, pixels cut off, pixels of the image, and its share of a square (I, 2)."""
    offset = like.new_tensor([v.offset[::-1] for v in views])
    scaled = like.new_tensor([v.scaled[::-1] for v in views])
    canvas = like.new_tensor([(v.canvas, v.canvas) for v in views])
    # of the side of the square, where the image stands in the middle of one
    size = like.new_tensor([(1, 1) if v.squashed else v.original[::-1] for v in views])
    return canvas, offset, scaled, size / size.amax(1, keepdim=True)
