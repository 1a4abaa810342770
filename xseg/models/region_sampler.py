"""Visual prompts as rows of the language model: the maximum over points inside the prompt (X-SAM section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_regions(
    cells: Tensor, image: Tensor, masks: Tensor, points: int = 256, ranks: Tensor | None = None
) -> Tensor:
    """Projected SAM cells (I, h, w, D), prompts (P, S, S) uint8 on images (P,) -> (P, D).

    ``ranks`` (P, points) choose among a prompt's pixels in reading order; by default they are spread evenly, so that
    the row of a prompt is always the same. An empty prompt gives a zero row.
    """
    inside = masks.flatten(1) > 0
    count = inside.sum(1, keepdim=True)
    if ranks is None:
        steps = (torch.arange(points, device=masks.device, dtype=torch.float64) + 0.5) / points
        ranks = (steps * count).long()
    running = inside.cumsum(1, dtype=torch.int32)
    pixel = torch.searchsorted(running, ranks.to(torch.int32) + 1).clamp(max=inside.shape[1] - 1)
    side = masks.shape[-1]
    xy = torch.stack((pixel % side, pixel // side), -1).float() / side
    maps = cells.permute(0, 3, 1, 2).float()[image]
    found = F.grid_sample(maps, 2 * xy[:, None] - 1, mode="bilinear", padding_mode="zeros", align_corners=True)
    best = found[:, :, 0].amax(-1)
    return torch.where(count > 0, best, 0.0).to(cells.dtype)
