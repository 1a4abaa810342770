"""Mask2Former's masked-attention decoder with queries conditioned on ``<SEG>`` (X-SAM section 3.2).

Several queries on one image share its features: in cross-attention the object queries of all of them are one long
sequence over one set of keys. Everything else is per query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xseg.models.configuration import SegmentorConfig
from xseg.models.pixel_decoder import LEVELS, flat, positions


@dataclass(frozen=True)
class Groups:
    """Which query belongs to which image; Q queries on I images, at most ``most`` on one image."""

    row: Tensor
    """(Q,) place of each query in the (image, slot) grid of I * ``most`` places."""
    images: int
    most: int

    def spread(self, x: Tensor) -> Tensor:
        """(Q, N, D) -> (I, most * N, D); empty places are zero."""
        grid = x.new_zeros(self.images * self.most, *x.shape[1:]).index_copy(0, self.row, x)
        return grid.reshape(self.images, self.most * x.shape[1], x.shape[2])

    def collect(self, x: Tensor) -> Tensor:
        """(I, most * N, ...) -> (Q, N, ...)."""
        return x.reshape(self.images * self.most, -1, *x.shape[2:]).index_select(0, self.row)


class MaskDecoder(nn.Module):
    """N object queries per query, refined by ``decoder_layers`` layers; a prediction before and after each."""

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        width = config.width
        self.queries_features = nn.Embedding(config.num_queries, width)
        self.queries_embedder = nn.Embedding(config.num_queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.layernorm = nn.LayerNorm(width)
        self.mask_embedder = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(
        self, mask_features: Tensor, maps: list[Tensor], seg: Tensor | None, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """Mask features (I, D, h, w), maps (I, D, ., .), ``<SEG>`` vectors (Q, D) or None.

        Returns normed queries (L, Q, N, D) and mask logits (L, Q, N, h, w) float32, last layer last.
        """
        rows = torch.arange(self.queries_features.num_embeddings, device=mask_features.device)
        levels = self.level_embed(torch.arange(LEVELS, device=mask_features.device))
        count = len(groups.row)
        x = self.queries_features(rows).expand(count, -1, -1)
        place = self.queries_embedder(rows).expand(count, -1, -1)
        if seg is not None:
            x = x + seg[:, None].to(x.dtype)
        values = [flat(m) + levels[i] for i, m in enumerate(maps)]
        keys = [v + positions(v.shape[-1], m).to(v.dtype) for v, m in zip(values, maps, strict=True)]
        normed = self.layernorm(x)
        spread = self._masks(normed, mask_features, groups)
        states, masks = [normed], [groups.collect(spread).float()]
        for number, layer in enumerate(self.layers):
            level = number % LEVELS
            open_cells = attention_mask(spread, maps[level].shape[-2:])
            x = layer(x, place, keys[level], values[level], open_cells, groups)
            normed = self.layernorm(x)
            spread = self._masks(normed, mask_features, groups)
            states.append(normed)
            masks.append(groups.collect(spread).float())
        return torch.stack(states), torch.stack(masks)

    def _masks(self, normed: Tensor, mask_features: Tensor, groups: Groups) -> Tensor:
        first, second, third = self.mask_embedder
        vectors = groups.spread(third(F.relu(second(F.relu(first(normed))))))
        return (vectors @ mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])


class DecoderLayer(nn.Module):
    """Masked cross-attention to one map, self-attention among a query's object queries, feed-forward; norms after."""

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        width = config.width
        self.cross_attn, self.cross_attn_layer_norm = Attention(width, config.heads), nn.LayerNorm(width)
        self.self_attn, self.self_attn_layer_norm = Attention(width, config.heads), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, config.ffn), nn.Linear(config.ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, place: Tensor, keys: Tensor, values: Tensor, open_cells: Tensor, groups: Groups
    ) -> Tensor:
        """(Q, N, D) -> (Q, N, D); keys and values (I, cells, D); ``open_cells`` (I, 1, most * N, cells) bool."""
        read = self.cross_attn(groups.spread(x + place), keys, values, open_cells)
        x = self.cross_attn_layer_norm(x + groups.collect(read))
        placed = x + place
        x = self.self_attn_layer_norm(x + self.self_attn(placed, placed, x))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class Attention(nn.Module):
    """Multi-head attention through sdpa."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, n, D), (B, m, D), (B, m, D) -> (B, n, D); ``mask`` True = may be read."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def attention_mask(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(I, n, h, w) mask logits -> (I, 1, n, cells) bool: True inside the mask; a query without any cell reads all."""
    inside = F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False).flatten(2).sigmoid() >= 0.5
    return (inside | ~inside.any(-1, keepdim=True))[:, None]
