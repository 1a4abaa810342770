"""Pixel decoders: a feature pyramid becomes three maps for the mask decoder and one map of mask features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerSinePositionEmbedding,
    multi_scale_deformable_attention,
)

from xseg.models.configuration import SegmentorConfig

LEVELS, POINTS, GROUPS = 3, 4, 32


def positions(width: int, x: Tensor) -> Tensor:
    """(1, h * w, width) sine positions of an (..., h, w) map, made in float32 and cast to the dtype of ``x``."""
    shape = torch.Size((1, width, *x.shape[-2:]))
    build = Mask2FormerSinePositionEmbedding.build_sine_position_embedding
    made = build(shape, x.device, torch.float32, width // 2, True, 2 * torch.pi)
    return made.flatten(2).transpose(1, 2).to(x.dtype)


def flat(x: Tensor) -> Tensor:
    """(I, C, h, w) -> (I, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


class DeformablePixelDecoder(nn.Module):
    """Mask2Former's: deformable attention over three levels, then one FPN step at the highest resolution.

    With X-SAM's pyramid (strides 8, 16, 32) mask features are at stride 8: there is no map of stride 4.
    """

    def __init__(self, config: SegmentorConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        self.projections = nn.ModuleList(convolution(c, width, 1, bias=True) for c in reversed(channels))
        self.level_embed = nn.Parameter(torch.empty(LEVELS, width))
        self.layers = nn.ModuleList(DeformableLayer(config) for _ in range(config.pixel_layers))
        self.lateral = convolution(channels[0], width, 1)
        self.output = convolution(width, width, 3)
        self.mask_projection = nn.Conv2d(width, width, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Pyramid, high resolution first -> mask features (I, D, h, w), three maps (I, D, ., .), low first."""
        maps = [project(x) for project, x in zip(self.projections, reversed(features), strict=True)]
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        places = [positions(x.shape[1], x) + self.level_embed[i] for i, x in enumerate(maps)]
        x, place = torch.cat([flat(x) for x in maps], 1), torch.cat(places, 1)
        reference = reference_points(shapes, x.device)
        for layer in self.layers:
            x = layer(x, place, reference, shapes)
        split = x.split([h * w for h, w in shapes], dim=1)
        out = [y.transpose(1, 2).unflatten(2, shape) for y, shape in zip(split, shapes, strict=True)]
        finest = F.relu(self.output(self.lateral(features[0]) + out[-1]))
        return self.mask_projection(finest), out


class DeformableLayer(nn.Module):
    """Deformable self-attention and a feed-forward block, norms after the sums."""

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(config.width, config.heads, LEVELS, POINTS)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1, self.fc2 = nn.Linear(config.width, config.pixel_ffn), nn.Linear(config.pixel_ffn, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, place: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(I, cells, D) -> (I, cells, D)."""
        x = self.self_attn_layer_norm(x + self.self_attn(x, place, reference, shapes))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class DeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """Each cell reads 4 points of each level around itself. Places are float32 in every dtype: bfloat16 has too few
    digits for a place on a 128 grid."""

    def forward(  # type: ignore[override]
        self, x: Tensor, place: Tensor, reference: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """(I, cells, D) -> (I, cells, D)."""
        images, cells, _ = x.shape
        query = x + place
        value = self.value_proj(x).unflatten(2, (self.n_heads, -1))
        offsets = self.sampling_offsets(query).view(images, cells, self.n_heads, self.n_levels, self.n_points, 2)
        weights = self.attention_weights(query).view(images, cells, self.n_heads, -1).softmax(-1)
        size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=x.device)
        locations = reference[None, :, None, None, None] + offsets.float() / size[:, None]
        weights = weights.unflatten(3, (self.n_levels, self.n_points))
        out = multi_scale_deformable_attention(value.float(), shapes, locations, weights.float())
        return self.output_proj(out.to(x.dtype))


def reference_points(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(cells, 2) centres (x, y) in 0..1 of the cells of all levels."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        levels.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1))
    return torch.cat(levels)


class FpnPixelDecoder(nn.Module):
    """Top-down convolutions only: half the cost of deformable attention on a CPU, for small models.

    Each level is told where its cells lie. Small image encoders forget it, and queries that cannot tell where they are
    cannot be told apart by a place.
    """

    def __init__(self, config: SegmentorConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        self.laterals = nn.ModuleList(convolution(c, width, 1) for c in reversed(channels))
        self.outputs = nn.ModuleList(convolution(width, width, 3) for _ in channels)
        self.mask_projection = nn.Conv2d(width, width, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As ``DeformablePixelDecoder``."""
        out: list[Tensor] = []
        for lateral, output, x in zip(self.laterals, self.outputs, reversed(features), strict=True):
            x = lateral(x)
            x = x + positions(x.shape[1], x).transpose(1, 2).unflatten(2, x.shape[-2:])
            if out:
                x = x + F.interpolate(out[-1], size=x.shape[-2:], mode="nearest")
            out.append(F.relu(output(x)))
        return self.mask_projection(out[-1]), out


def convolution(inputs: int, outputs: int, size: int, bias: bool = False) -> nn.Sequential:
    """Convolution and group norm."""
    groups = GROUPS if outputs % GROUPS == 0 else 8
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias), nn.GroupNorm(groups, outputs))
