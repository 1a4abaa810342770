"""Projectors into and out of the language model, and the pixel shuffles of the released weights."""

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """Linear, exact GELU, Linear: (..., inputs) -> (..., outputs) (X-SAM section 3.2).

    ``normed``: each row is brought to mean 0 and variance 1 first; no weights come with it.
    """

    def __init__(self, inputs: int, outputs: int, normed: bool = False) -> None:
        super().__init__()
        self.inputs, self.normed = inputs, normed
        self.first, self.second = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if self.normed:
            x = F.layer_norm(x, (self.inputs,))
        return self.second(F.gelu(self.first(x)))


def unshuffle(x: Tensor, block: int = 2) -> Tensor:
    """(I, h, w, C) -> (I, h/b, w/b, b*b*C), cells of a block in row-major order; odd sides are zero padded."""
    down, right = -x.shape[1] % block, -x.shape[2] % block
    if down or right:
        x = F.pad(x, (0, 0, 0, right, 0, down))
    images, height, width, channels = x.shape
    x = x.reshape(images, height // block, block, width // block, block, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(images, height // block, width // block, block * block * channels)


def shuffle(x: Tensor, block: int = 2) -> Tensor:
    """(I, h, w, b*b*C) -> (I, b*h, b*w, C), channel blocks in column-major order, as the released connector has it.

    So ``shuffle`` is not the inverse of ``unshuffle``, and neither is ``torch.nn.PixelShuffle``.
    """
    images, height, width, channels = x.shape
    x = x.reshape(images, height, width, block, block, channels // block**2)
    return x.permute(0, 1, 4, 2, 3, 5).reshape(images, height * block, width * block, channels // block**2)
