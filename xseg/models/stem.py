"""Strided convolutions in the place of a patch embedding, for encoders trained from scratch on small pictures."""

import torch.nn.functional as F
from torch import Tensor, nn

from xseg.models.configuration import SamConfig, SiglipConfig


class ResidualStem(nn.Module):
    """Three strided convolutions with residual pairs between them, for a patch of 8, and a fourth for one of 16.

    Edges and small shapes are seen far sooner than through one linear patch.
    """

    def __init__(self, config: SamConfig | SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.to_half = nn.Conv2d(config.num_channels, width // 4, 3, stride=2, padding=1)
        self.to_quarter = nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1)
        self.quarter_blocks = nn.ModuleList(ResidualPair(width // 2) for _ in range(2))
        self.to_eighth = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.eighth_block = ResidualPair(width)
        self.to_sixteenth = nn.Conv2d(width, width, 3, stride=2, padding=1) if config.patch_size == 16 else None

    def forward(self, pixels: Tensor) -> Tensor:
        """(I, 3, S, S) -> (I, C, S / patch, S / patch)."""
        x = self.to_quarter(F.gelu(self.to_half(pixels)))
        for block in self.quarter_blocks:
            x = block(x)
        x = self.eighth_block(self.to_eighth(F.gelu(x)))
        return x if self.to_sixteenth is None else self.to_sixteenth(F.gelu(x))


class ResidualPair(nn.Module):
    """Two 3x3 convolutions with group norms, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(I, C, h, w) -> the same shape."""
        return x + self.conv2(F.gelu(self.norm2(self.conv1(F.gelu(self.norm1(x))))))
