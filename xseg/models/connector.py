"""From SAM's hidden states to a pyramid of features (X-SAM section 3.2, segmentation connector)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from xseg.errors import UserError
from xseg.models.projector import shuffle, unshuffle


class Connector(nn.Module):
    """One ``Level`` per hidden state; outputs are (I, channels, h, w), high resolution first."""

    def __init__(self, inputs: int, width: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(inputs, width, scale) for scale in scales)
        self.channels = [int(inputs / scale) for scale in scales]

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """(I, g, g, C) hidden states, one per level -> feature maps."""
        return [level(state) for level, state in zip(self.levels, states, strict=True)]


class Level(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each with a norm and no activation, then a pixel shuffle by ``scale``."""

    def __init__(self, inputs: int, width: int, scale: float) -> None:
        super().__init__()
        if scale not in (2, 1, 0.5):
            raise UserError(f"segmentor.connector_scales holds {scale}: a level is scaled by 2, 1 or 0.5")
        self.scale = scale
        out = int(inputs * scale)
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """(I, g, g, C) -> (I, C / scale, scale * g, scale * g); odd sides are zero padded to even ones first."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = self.norm1(self.conv1(x.permute(0, 3, 1, 2)))
        x = self.norm3(self.conv3(self.norm2(self.conv2(x)))).permute(0, 2, 3, 1)
        if self.scale == 2:
            x = shuffle(x)
        elif self.scale == 0.5:
            x = unshuffle(x)
        return x.permute(0, 3, 1, 2).contiguous()


def norm(width: int) -> SamLayerNorm:
    """Layer norm over the channels of an (I, C, h, w) map."""
    return SamLayerNorm(width, eps=1e-6, data_format="channels_first")
