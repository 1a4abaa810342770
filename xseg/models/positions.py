"""Position tables of the image encoders at another resolution than the one they were trained at."""

import re
from collections.abc import Sequence
from math import isqrt

import torch.nn.functional as F
from torch import Tensor

RELATIVE = re.compile(r"\.rel_pos_[hw]$")
GRID = re.compile(r"\.pos_embed$")
ROWS = re.compile(r"\.position_embedding\.weight$")


def fitted(name: str, value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A table of positions as the parameter ``name`` of ``shape`` needs it; None when it is no such table.

    SAM's relative tables (2 g - 1, d) are interpolated linearly, as SAM itself does for other lengths; its grid
    (1, g, g, C) and SigLIP's rows (g * g, C) bicubically, as in ViTDet, where SAM's encoder comes from, and in
    transformers. The channels must agree.
    """
    if value.shape[-1] != shape[-1] or value.dim() != len(shape):
        return None
    table = value.float()
    if RELATIVE.search(name):
        return F.interpolate(table.T[None], size=shape[0], mode="linear")[0].T
    if GRID.search(name):
        return _bicubic(table.permute(0, 3, 1, 2), shape[1:3]).permute(0, 2, 3, 1)
    here, there = isqrt(shape[0]), isqrt(len(value))
    if ROWS.search(name) and here**2 == shape[0] and there**2 == len(value):
        grid = table.T.unflatten(1, (there, there))[None]
        return _bicubic(grid, (here, here))[0].flatten(1).T
    return None


def _bicubic(grid: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(grid, size=tuple(size), mode="bicubic", align_corners=False)
