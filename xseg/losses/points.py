"""Where masks are compared: uniform and uncertain points, and the sampling of logits and uint8 masks at points.

Coordinates are (x, y) in [0, 1] of the whole canvas; (0, 0) is the outer corner of the first pixel. Outside = 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[str, int, int, tuple[int, ...]], Tensor]
"""``draw(kind, layer, item, shape)`` -> uniform [0, 1) randoms; kind is "matcher", "candidates" or "remainder", layer
the decoder prediction (0 = initial queries), item the query of the batch."""
Randoms = Draw | torch.Generator
"""Recorded or keyed randoms, or a generator on the device of the logits."""
CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Most values sampled at once. On a CPU larger buffers are mapped anew for every operation, which costs more than the
operation; on a GPU few large kernels are better."""


def chunks(rows: int, per_row: int, device: torch.device) -> list[slice]:
    """Cut ``rows`` rows of ``per_row`` values each into slices within the budget, one row at least."""
    step = max(1, CHUNK.get(device.type, 2**26) // max(1, per_row))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Return a generator that depends on ``key`` alone, for example (seed, rank, step), so that runs resume exactly."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> 1))


def uniform(
    randoms: Randoms, kind: str, layers: int, rows: Sequence[int], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draw (layers, sum(rows), *shape) randoms, ``rows[item]`` rows for each item."""
    if isinstance(randoms, torch.Generator):
        return torch.rand(layers, sum(rows), *shape, generator=randoms, device=device)
    drawn = [
        torch.cat([randoms(kind, layer, item, (n, *shape)).to(device) for item, n in enumerate(rows)])
        for layer in range(layers)
    ]
    return torch.stack(drawn)


def sample_logits(logits: Tensor, coords: Tensor) -> Tensor:
    """Bilinear values of (R, C, h, w) maps at (R, P, 2) points: (R, C, P); the C maps of a row share its points."""
    return F.grid_sample(logits, 2 * coords[:, :, None] - 1, align_corners=False)[..., 0]


@torch.no_grad()
def sample_masks(masks: Tensor, rows: Tensor, coords: Tensor) -> Tensor:
    """Bilinear values of (M, S, S) uint8 masks, read by gather: rows (G, m) at (G, P, 2) -> (G, m, P) float32."""
    out = coords.new_zeros(*rows.shape, coords.shape[1])
    for part in chunks(len(rows), rows.shape[1] * coords.shape[1], coords.device):
        _add_taps(out[part], masks, rows[part], coords[part])
    return out


def _add_taps(out: Tensor, masks: Tensor, rows: Tensor, coords: Tensor) -> None:
    height, width = masks.shape[-2:]
    x, y = (coords * coords.new_tensor([width, height]) - 0.5).unbind(-1)
    columns, rows_of_pixels = _pair(x, width), _pair(y, height)
    base = (rows * (height * width))[..., None]
    flat = masks.reshape(-1)
    for row, row_weight in rows_of_pixels:
        for column, column_weight in columns:
            index = base + (row * width + column)[:, None]
            values = flat.index_select(0, index.flatten()).view_as(out)
            out.addcmul_(values, (row_weight * column_weight)[:, None])


def _pair(at: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels around each place on one axis, and their weights; a pixel outside has weight 0."""
    low = at.floor()
    share = at - low
    low_weight, high_weight = (1 - share) * (low >= 0), share * (low < size - 1)
    index = low.long()
    return [(index.clamp(min=0), low_weight), ((index + 1).clamp(max=size - 1), high_weight)]


@torch.no_grad()
def uncertain_points(logits: Tensor, candidates: Tensor, remainder: Tensor, num_points: int) -> Tensor:
    """PointRend's points for (R, h, w) logits: the candidates (R, P', 2) nearest to the boundary, then ``remainder``.

    As many candidates are kept as ``remainder`` (R, P'', 2) leaves of ``num_points``. Returns (R, num_points, 2).
    """
    wanted = num_points - remainder.shape[1]
    kept = torch.empty(len(logits), wanted, 2, device=logits.device)
    for part in chunks(len(logits), candidates.shape[1], logits.device):
        doubt = sample_logits(logits[part, None], candidates[part])[:, 0].abs()
        nearest = doubt.topk(wanted, dim=1, largest=False, sorted=False).indices
        kept[part] = candidates[part].gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([kept, remainder], dim=1)
