"""Images and regions take the places of their sentinels: from token positions to rows of the language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xseg.tokens import IGNORE_LABEL, SENTINELS
from xseg.types import Batch


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of each sample stand among the n rows after splicing."""

    start: Tensor
    """(B, T) first row of each token; an image has many rows, a region may have several."""
    total: Tensor
    """(B,) rows of each sample."""
    mask: Tensor
    """(B, n) bool, True on rows; at least one per sample, so that attention is defined."""

    @classmethod
    def of(cls, batch: Batch, image_rows: int, region_rows: int = 1) -> "Layout":
        """Lay a batch out; every image has ``image_rows`` rows, every region ``region_rows``, everything else one."""
        size = torch.where(batch.input_ids == SENTINELS["<image>"], image_rows, 1)
        size = torch.where(batch.input_ids == SENTINELS["<region>"], region_rows, size) * batch.attention_mask
        total = size.sum(1)
        length = int(total.max())
        mask = torch.arange(length, device=total.device) < total[:, None].clamp(min=1)
        return cls(size.cumsum(1) - size, total, mask)

    def splice(self, batch: Batch, words: Tensor, images: Tensor | None, regions: Tensor | None) -> Tensor:
        """Words (B, T, D), image rows (I, r, D), region rows (P, k, D) -> (B, n, D); padding is zero."""
        samples, length = self.mask.shape
        stride = length + 1  # the last row of each sample is a bin for what has no place
        is_word = batch.attention_mask & (batch.input_ids >= 0)
        base = torch.arange(samples, device=words.device) * stride
        target = torch.where(is_word, self.start, length) + base[:, None]
        rows = words.new_zeros(samples * stride, words.shape[-1]).index_copy(0, target.flatten(), words.flatten(0, 1))
        if images is not None and len(batch.image_slot):
            sample, position, image = batch.image_slot.unbind(1)
            place = _run(self.start[sample, position] + base[sample], images.shape[1])
            rows = rows.index_copy(0, place, images[image].flatten(0, 1).to(rows.dtype))
        if regions is not None and len(batch.region_position):
            sample, position = batch.region_position.unbind(1)
            place = _run(self.start[sample, position] + base[sample], regions.shape[1])
            rows = rows.index_copy(0, place, regions.flatten(0, 1).to(rows.dtype))
        return rows.view(samples, stride, -1)[:, :length]

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, row, label) of every prediction with a label: the row before the labelled token."""
        wanted = (batch.labels != IGNORE_LABEL) & batch.attention_mask & (self.start > 0)
        sample, token = wanted.nonzero(as_tuple=True)
        return sample, self.start[sample, token] - 1, batch.labels[sample, token]

    def spans(self, spans: Tensor) -> tuple[Tensor, Tensor]:
        """Spans (C, 3) of tokens -> rows (C, W) of the longest span's width, and which of them count (C, W)."""
        sample, first, last = spans[:, 0], self.start[spans[:, 0], spans[:, 1]], spans[:, 2] - 1
        end = self.start[sample, last] + 1
        width = int((end - first).max())
        rows = first[:, None] + torch.arange(width, device=spans.device)
        real = rows < end[:, None]
        return torch.where(real, rows, first[:, None]), real


def _run(first: Tensor, count: int) -> Tensor:
    """(n,) first rows -> (n * count,) the rows from each of them on."""
    return (first[:, None] + torch.arange(count, device=first.device)).flatten()
