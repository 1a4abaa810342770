"""From SAM's hidden states to a pyramid of features (X-SAM section 3.2, segmentation connector)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from xseg.errors import UserError
from xseg.models.projector import shuffle, unshuffle

SINGLE = ("conv", "linear", "none")
"""Kinds of ``SingleScale``."""


class Connector(nn.Module):
    """One ``Level`` per hidden state; outputs are (I, channels, h, w), high resolution first."""

    def __init__(self, inputs: int, width: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(inputs, width, scale) for scale in scales)
        self.channels = [int(inputs / scale) for scale in scales]

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """(I, g, g, C) hidden states, one per level -> feature maps."""
        return [level(state) for level, state in zip(self.levels, states, strict=True)]


class SingleScale(nn.Module):
    """The last hidden state alone, and a pyramid made from that one map by plain resizing (X-SAM, Table 9).

    ``kind``: "conv" = a ``Level`` of scale 1, "linear" = one 1x1 projection, "none" = the state itself. Maps have the
    sizes of ``Connector``'s, so that nothing but their content differs.
    """

    def __init__(self, inputs: int, width: int, scales: Sequence[float], kind: str) -> None:
        super().__init__()
        self.scales = [known_scale(scale) for scale in scales]
        self.channels = [inputs for _ in scales]
        self.block: nn.Module = nn.Identity()
        if kind == "conv":
            self.block = Level(inputs, width, 1)
        elif kind == "linear":
            self.block = nn.Linear(inputs, inputs)
        self.is_conv = kind == "conv"

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The one (I, g, g, C) hidden state -> feature maps, each with C channels."""
        x = self.block(states[-1])
        if not self.is_conv:
            x = even(x).permute(0, 3, 1, 2)
        return [resized(x, scale).contiguous() for scale in self.scales]


class Level(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each with a norm and no activation, then a pixel shuffle by ``scale``."""

    def __init__(self, inputs: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = known_scale(scale)
        out = int(inputs * scale)
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """(I, g, g, C) -> (I, C / scale, scale * g, scale * g); odd sides are zero padded to even ones first."""
        x = self.norm1(self.conv1(even(x).permute(0, 3, 1, 2)))
        x = self.norm3(self.conv3(self.norm2(self.conv2(x)))).permute(0, 2, 3, 1)
        if self.scale == 2:
            x = shuffle(x)
        elif self.scale == 0.5:
            x = unshuffle(x)
        return x.permute(0, 3, 1, 2).contiguous()


def known_scale(scale: float) -> float:
    """Return ``scale``. Raises UserError for one that no level can have."""
    if scale not in (2, 1, 0.5):
        raise UserError(f"segmentor.connector_scales holds {scale}: a level is scaled by 2, 1 or 0.5")
    return scale


def even(x: Tensor) -> Tensor:
    """(I, h, w, C) with odd sides zero padded to even ones, bottom and right."""
    return F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))


def resized(x: Tensor, scale: float) -> Tensor:
    """(I, C, h, w), even sides -> (I, C, scale * h, scale * w): bilinear upwards, means of 2x2 cells downwards."""
    if scale == 2:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return x if scale == 1 else F.avg_pool2d(x, 2)


def norm(width: int) -> SamLayerNorm:
    """Layer norm over the channels of an (I, C, h, w) map."""
    return SamLayerNorm(width, eps=1e-6, data_format="channels_first")
