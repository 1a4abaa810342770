"""SAM's mask decoder with many mask tokens and ``<SEG>`` as its prompt, to compare with Mask2Former's (X-SAM, Table 9).

Tokens and image change each other, so every query has its own copy of the map: this decoder cannot share one map among
the queries of an image as ``mask_decoder`` does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamTwoWayTransformer

from xseg.models.configuration import SegmentorConfig
from xseg.models.connector import norm
from xseg.models.mask_decoder import Groups
from xseg.models.pixel_decoder import positions


class Neck(nn.Module):
    """SAM's neck in place of a pixel decoder: 1x1 and 3x3 convolution, each with a norm."""

    def __init__(self, config: SegmentorConfig, channels: Sequence[int]) -> None:
        super().__init__()
        (inputs,) = channels
        self.conv1, self.norm1 = nn.Conv2d(inputs, config.width, 1, bias=False), norm(config.width)
        self.conv2, self.norm2 = nn.Conv2d(config.width, config.width, 3, padding=1, bias=False), norm(config.width)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One map at SAM's grid -> the map that the decoder reads (I, D, g, g), and no others."""
        (x,) = features
        return self.norm2(self.conv2(self.norm1(self.conv1(x)))), []


class TwoWayMaskDecoder(nn.Module):
    """N mask tokens and one prompt token per query; ``decoder_layers`` two-way layers; one prediction.

    Each token's vector is compared with a map that transposed convolutions make four times as fine. SAM has a small
    network per mask token; here the tokens are many and interchangeable, so they share one.
    """

    def __init__(self, config: SegmentorConfig) -> None:
        super().__init__()
        width = config.width
        sizes = SamMaskDecoderConfig(
            hidden_size=width,
            num_attention_heads=config.heads,
            num_hidden_layers=config.decoder_layers,
            mlp_dim=config.ffn,
        )
        sizes._attn_implementation = "sdpa"
        self.mask_tokens = nn.Embedding(config.num_queries, width)
        self.transformer = SamTwoWayTransformer(sizes)
        self.upscale1, self.upscale_norm = nn.ConvTranspose2d(width, width // 4, 2, stride=2), norm(width // 4)
        self.upscale2 = nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2)
        self.mask_embedder = SamFeedForward(width, width, width // 8, 3)

    def forward(
        self, mask_features: Tensor, maps: list[Tensor], seg: Tensor | None, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """Map (I, D, g, g), ``<SEG>`` vectors (Q, D) or None, which is the same as zeros; ``maps`` are not read.

        Returns normed queries (1, Q, N, D) and mask logits (1, Q, N, 4 g, 4 g) float32.
        """
        rows = torch.arange(self.mask_tokens.num_embeddings, device=mask_features.device)
        tokens = self.mask_tokens(rows).expand(len(groups.row), -1, -1)
        prompt = tokens.new_zeros(len(tokens), 1, tokens.shape[2])
        if seg is not None:
            prompt = prompt + seg[:, None].to(tokens.dtype)
        own = mask_features.index_select(0, groups.row // groups.most)
        place = positions(own.shape[1], own).transpose(1, 2).unflatten(2, own.shape[-2:])
        states, cells = self.transformer(
            point_embeddings=torch.cat((tokens, prompt), 1)[:, None],
            image_embeddings=own,
            image_positional_embeddings=place,
            attention_similarity=None,
        )
        states = states[:, 0, : len(rows)]
        fine = self.upscale1(cells[:, 0].transpose(1, 2).unflatten(2, own.shape[-2:]))
        fine = F.gelu(self.upscale2(F.gelu(self.upscale_norm(fine))))
        masks = (self.mask_embedder(states) @ fine.flatten(2)).unflatten(2, fine.shape[-2:])
        return states[None], masks.float()[None]
