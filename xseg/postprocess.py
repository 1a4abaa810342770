"""Mask logits of one query -> segments in original pixels. Pure functions, no state (X-SAM section 3; Mask2Former).

Predictions are chosen by their class logits at low resolution, and only the chosen are brought to original pixels, by
one composed bilinear map (two matrix products). The result equals upsampling everything to the canvas, cropping the
padding away and resizing to the original.

All functions read ``mask_logits`` (N, h, w) and ``class_logits`` (N, K + 1), background last, of one decoder layer.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xseg.geometry.masks import Rle, decode, encode, on_canvas
from xseg.types import Masks, Segment, ViewGeometry

CHUNK = 2**23
"""Most values in original pixels held at once (32 MiB in float32)."""


def _stretch(values: Tensor, size: int) -> Tensor:
    """Bilinear resize along one axis: (from, k) -> (size, k)."""
    return F.interpolate(values.T[None], size, mode="linear")[0].T


class _Resize:
    """The two steps from the mask grid to original pixels, for rows (y) and columns (x)."""

    def __init__(self, grid: Sequence[int], g: ViewGeometry, device: torch.device) -> None:
        if g.offset != (0, 0) or max(g.scaled) > g.canvas:
            raise ValueError(f"{g}: a view cut by augmentation does not show the whole image, so there is no way back")
        self.size = g.original
        # (scaled, grid): from the mask grid to the part of the canvas that shows the image
        self.up_y = _stretch(torch.eye(grid[0], device=device), g.canvas)[: g.scaled[0]]
        self.up_x = _stretch(torch.eye(grid[1], device=device), g.canvas)[: g.scaled[1]]
        self.y = _stretch(self.up_y, g.original[0])
        self.x = _stretch(self.up_x, g.original[1]).T

    def __call__(self, logits: Tensor) -> Tensor:
        """(n, h, w) -> (n, H, W)."""
        return (self.y @ logits.float()) @ self.x

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Split rows so that their masks in original pixels fit the budget."""
        return iter(rows.split(max(1, CHUNK // (self.size[0] * self.size[1]))))


def to_original(mask_logits: Tensor, g: ViewGeometry) -> Tensor:
    """(n, h, w) logits on the mask grid -> (n, H, W) float32 logits in original pixels."""
    return _Resize(mask_logits.shape[1:], g, mask_logits.device)(mask_logits)


@torch.no_grad()
def panoptic(
    mask_logits: Tensor,
    class_logits: Tensor,
    g: ViewGeometry,
    *,
    is_thing: Sequence[bool],
    score_threshold: float,
    mask_threshold: float = 0.5,
    overlap: float = 0.8,
) -> tuple[np.ndarray, list[Segment]]:
    """Give every pixel to the prediction with the largest mask probability times score.

    Predictions need a best foreground score above ``score_threshold`` (the background is not asked). One is dropped,
    leaving void, when the pixels it won are at most ``overlap`` of those where probability times score reaches
    ``mask_threshold``. Stuff of one class is one segment, with the best score of its parts.
    Returns the (H, W) int32 map (0 = void, else 1 + index of the segment) and the segments.
    """
    scores, labels = class_logits.float().softmax(-1)[:, :-1].max(-1)
    kept = (scores > score_threshold).nonzero()[:, 0]
    resize = _Resize(mask_logits.shape[1:], g, mask_logits.device)
    best = torch.full(g.original, -1.0, device=mask_logits.device)
    winner = torch.zeros(g.original, dtype=torch.long, device=mask_logits.device)
    areas = [winner.new_zeros(0)]
    start = 0
    for rows in resize.chunks(kept) if len(kept) else ():
        prob = resize(mask_logits[rows]).sigmoid_().mul_(scores[rows, None, None])
        areas.append((prob >= mask_threshold).flatten(1).sum(1))
        value, index = prob.max(0)
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, index + start, winner)
        start += len(rows)
    area = torch.cat(areas)
    won = torch.bincount(winner.flatten(), minlength=len(kept))[: len(kept)]
    valid = (won > 0) & (area > 0) & (won / area > overlap)
    # One copy to the host for everything that is decided per prediction.
    columns = torch.stack([valid.double(), labels[kept].double(), scores[kept].double()]).cpu().tolist()
    parts = [(int(label), score) if ok else None for ok, label, score in zip(*columns, strict=True)]
    ids, found = _merge_stuff(parts, is_thing)
    table = torch.tensor([*ids, 0], dtype=torch.int32, device=winner.device)
    id_map = table[winner].cpu().numpy() if len(kept) else np.zeros(g.original, np.int32)
    return id_map, [Segment(encode(id_map == i), label, score) for i, (label, score) in enumerate(found, start=1)]


def _merge_stuff(
    parts: Sequence[tuple[int, float] | None], is_thing: Sequence[bool]
) -> tuple[list[int], list[tuple[int, float]]]:
    """Number the valid predictions from 1, one number per stuff class; returns a number per prediction (0 = none)."""
    ids: list[int] = []
    found: list[tuple[int, float]] = []
    stuff: dict[int, int] = {}
    for part in parts:
        if part is None:
            ids.append(0)
            continue
        label, score = part
        if label in stuff:
            place = stuff[label]
            found[place - 1] = (label, max(score, found[place - 1][1]))
        else:
            found.append(part)
            place = len(found)
            if not is_thing[label]:
                stuff[label] = place
        ids.append(place)
    return ids, found


@torch.no_grad()
def semantic(
    mask_logits: Tensor, class_logits: Tensor, g: ViewGeometry, *, average: Literal["canvas", "original"] = "canvas"
) -> np.ndarray:
    """Label every pixel with the class of the largest sum of class probability times mask probability.

    ``average``: where the sums are made, "canvas" = on the canvas, then resized (the published models), or
    "original" = in original pixels. Returns (H, W) int32 class indices; background is no class.
    """
    resize = _Resize(mask_logits.shape[1:], g, mask_logits.device)
    classes = class_logits.float().softmax(-1)[:, :-1].T.contiguous()
    up_y, up_x = (resize.up_y, resize.up_x.T) if average == "canvas" else (resize.y, resize.x)
    down_y, down_x = (
        _stretch(torch.eye(len(up), device=mask_logits.device), size)
        for up, size in ((up_y, g.original[0]), (up_x.T, g.original[1]))
    )
    logits = mask_logits.float() @ up_x
    out = torch.zeros(g.original, dtype=torch.int32, device=mask_logits.device)
    wide = max(len(classes), len(mask_logits)) * max(up_x.shape[1], g.original[1])
    step = max(1, CHUNK // wide)
    for top in range(0, g.original[0], step):
        rows = down_y[top : top + step]
        used = rows.any(0).nonzero()[:, 0]
        first, last = int(used[0]), int(used[-1]) + 1
        prob = (up_y[first:last] @ logits).sigmoid_()
        sums = (classes @ prob.flatten(1)).view(len(classes), last - first, -1)
        if average == "canvas":
            sums = rows[:, first:last] @ (sums @ down_x.T)
        out[top : top + step] = sums.argmax(0)
    return out.cpu().numpy()


@torch.no_grad()
def instances(
    mask_logits: Tensor, class_logits: Tensor, g: ViewGeometry, *, top_k: int = 200, score_threshold: float
) -> list[Segment]:
    """Return the ``top_k`` pairs of prediction and class, best first; one prediction may answer for several classes.

    Mask: logit > 0 in original pixels. Score: class probability times the mean mask probability inside the mask, at
    least ``score_threshold``. Empty masks are left out.
    """
    prob = class_logits.float().softmax(-1)[:, :-1]
    scores, flat = prob.flatten().topk(min(top_k, prob.numel()))
    # The mean of a probability is at most 1: what is below the threshold now stays below.
    alive = scores >= score_threshold
    scores, flat = scores[alive], flat[alive]
    query, label = flat // max(1, prob.shape[1]), flat % max(1, prob.shape[1])
    resize = _Resize(mask_logits.shape[1:], g, mask_logits.device)
    rows, place = query.unique(return_inverse=True)
    means = [scores.new_zeros(0)]
    rles: list[dict[str, object]] = []
    for chunk in resize.chunks(rows) if len(rows) else ():
        logits = resize(mask_logits[chunk]).flatten(1)
        inside = logits > 0
        means.append((logits.sigmoid() * inside).sum(1) / (inside.sum(1) + 1e-6))
        rles += [encode(m) for m in inside.view(-1, *g.original).cpu().numpy()]
    final = scores * torch.cat(means)[place]
    best_first = final.argsort(descending=True, stable=True)
    columns = torch.stack([t[best_first].double() for t in (final, label, place)]).cpu().tolist()
    found = [Segment(rles[int(row)], int(c), s) for s, c, row in zip(*columns, strict=True) if s >= score_threshold]
    return [s for s in found if s.score > 0]


@torch.no_grad()
def best(
    mask_logits: Tensor,
    class_logits: Tensor,
    g: ViewGeometry,
    *,
    concept: int = 0,
    threshold: float = 0.5,
    reject: float = 0.0,
    join: float | None = None,
) -> Segment:
    """Return the mask (probability above ``threshold``) of the prediction most sure of class ``concept``.

    ``reject``: the mask is empty when that prediction gives the concept less than this part of what concept and
    background have together; 0.5 = when it takes background for likelier, 0 = never. ``join``: the masks of all other
    predictions of at least this class probability are united with it (several targets, GRES); None = of none. The
    score is the class probability of the best one, also where the mask is empty.
    """
    prob = class_logits.float().softmax(-1)
    query = prob[:, concept].argmax()
    score, background = torch.stack([prob[query, concept], prob[query, -1]]).tolist()
    if score < reject * (score + background):
        return Segment(encode(np.zeros(g.original, bool)), concept, score)
    rows = query[None]
    if join is not None:
        rows = torch.cat([rows, (prob[:, concept] >= join).nonzero()[:, 0]]).unique()
    resize = _Resize(mask_logits.shape[1:], g, mask_logits.device)
    mask = torch.zeros(g.original, dtype=torch.bool, device=mask_logits.device)
    for chunk in resize.chunks(rows):
        mask |= (resize(mask_logits[chunk]).sigmoid() > threshold).any(0)
    return Segment(encode(mask.cpu().numpy()), concept, score)


@torch.no_grad()
def sure(
    mask_logits: Tensor,
    class_logits: Tensor,
    g: ViewGeometry,
    *,
    concept: int,
    least: float,
    threshold: float = 0.5,
) -> list[Segment]:
    """Return the masks of all predictions of at least ``least`` probability of class ``concept``, surest first.

    Masks without a pixel are left out.
    """
    prob = class_logits.float().softmax(-1)[:, concept]
    rows = prob.argsort(descending=True, stable=True)
    rows = rows[prob[rows] >= least]
    resize = _Resize(mask_logits.shape[1:], g, mask_logits.device)
    out: list[Segment] = []
    for chunk in resize.chunks(rows) if len(rows) else ():
        masks = (resize(mask_logits[chunk]).sigmoid() > threshold).cpu().numpy()
        scores = prob[chunk].tolist()
        out += [Segment(encode(m), concept, score) for m, score in zip(masks, scores, strict=True) if m.any()]
    return out


@torch.no_grad()
def prompted(
    mask_logits: Tensor,
    class_logits: Tensor,
    g: ViewGeometry,
    prompt: Rle,
    *,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    nearest_by: Literal["box", "mask"] = "box",
) -> Segment:
    """Return the mask of the one object a drawn prompt points at (X-SAM's rule for interactive segmentation).

    A prediction's score is its probability of class 0 times the mean mask probability inside its mask. Candidates score
    at least ``score_threshold``, or are the best one where there is none; of these the one that overlaps ``prompt``
    (original pixels) most, the last of equals: by the IoU of their boxes (the published models) or of the masks
    themselves (branch main). A candidate without a pixel overlaps nothing.
    """
    prob = class_logits.float().softmax(-1)[:, 0]
    rows = prob.argsort(descending=True, stable=True)
    resize = _Resize(mask_logits.shape[1:], g, mask_logits.device)
    drawn = decode(prompt).astype(bool)
    box = _box(drawn)
    best: tuple[float, np.ndarray] | None = None
    near: tuple[tuple[float, int], float, np.ndarray] | None = None
    for chunk in resize.chunks(rows):
        # the mean of a probability is at most 1: no later prediction can score more than this
        ceiling = float(prob[chunk[0]])
        if best is not None and ceiling < (score_threshold if near else min(best[0], score_threshold)):
            break
        soft = resize(mask_logits[chunk]).sigmoid()
        inside = soft > mask_threshold
        means = (soft * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        scores = (prob[chunk] * means).tolist()
        for mask, score, row in zip(inside.cpu().numpy(), scores, chunk.tolist(), strict=True):
            if best is None or score > best[0]:
                best = (score, mask)
            if score < score_threshold:
                continue
            overlap = (_box_iou(_box(mask), box) if nearest_by == "box" else _mask_iou(mask, drawn), row)
            if near is None or overlap > near[0]:
                near = (overlap, score, mask)
    assert best is not None, "there is always a best prediction"
    score, mask = best if near is None else near[1:]
    return Segment(encode(mask), 0, score)


@torch.no_grad()
def nearest(mask_logits: Tensor, g: ViewGeometry, truths: Sequence[Rle]) -> list[dict[str, object]]:
    """Return the prediction (logit > 0, original pixels) nearest to each truth: what a perfect choice would give.

    The nearest is found on the mask grid, by the IoU with the part of each cell that the truth covers; only the
    nearest are brought to original pixels.
    """
    if not truths:
        return []
    grid = mask_logits.shape[1:]
    canvas = on_canvas(Masks(g.original, tuple(truths)), range(len(truths)), g)
    shown = np.zeros((1, g.canvas, g.canvas), np.uint8)
    shown[:, : g.scaled[0], : g.scaled[1]] = 1
    dense = torch.from_numpy(np.concatenate([canvas, shown])).to(mask_logits.device, torch.float32)
    cover = F.interpolate(dense[:, None], tuple(grid), mode="area").flatten(1)
    cells = (mask_logits.flatten(1) > 0) * cover[-1]
    inter = cover[:-1] @ cells.T
    union = cover[:-1].sum(1, keepdim=True) + cells.sum(1) - inter
    rows = (inter / union.clamp_min(1e-6)).argmax(1)
    resize = _Resize(grid, g, mask_logits.device)
    out: list[dict[str, object]] = []
    for chunk in resize.chunks(rows):
        out += [encode(mask) for mask in (resize(mask_logits[chunk]) > 0).cpu().numpy()]
    return out


def _box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right), half-open, of a (H, W) mask; None without a pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _box_iou(a: tuple[int, int, int, int] | None, b: tuple[int, int, int, int] | None) -> float:
    if a is None or b is None:
        return 0.0
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(height, 0) * max(width, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (sum(areas) - inter)


def _mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0
