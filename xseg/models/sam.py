"""SAM's image encoder from transformers, without its neck, returning the hidden states that are asked for."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionSdpaAttention

from xseg.models.configuration import SamConfig
from xseg.models.stem import ResidualStem


class SamEncoder(SamVisionEncoder):
    """(I, 3, S, S) pixels -> hidden states, each (I, g, g, C) with g = S / patch size; 0 = patch embedding.

    The neck exists so that SAM's files load whole; it is never computed and stays frozen.
    """

    config: SamConfig

    def __init__(self, config: SamConfig) -> None:
        super().__init__(config)
        if config.stem == "residual":
            self.patch_embed: Any = ResidualStem(config)
        for layer in self.layers:
            layer.attn = RelativeAttention(config, layer.window_size)
        self.post_init()

    def freeze_unread(self, last: int) -> None:
        """Freeze the neck and the blocks behind hidden state ``last``."""
        for module in (self.neck, *self.layers[last:]):
            module.requires_grad_(False)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside of transformers the library passes over modules without parameters of their own.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.pos_embed is not None:
            init.trunc_normal_(self.pos_embed, std=0.02)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:  # type: ignore[override]
        """Return hidden states ``layers`` (negative counts from the end), in that order; later blocks do not run."""
        count = len(self.layers) + 1
        wanted = [layer % count for layer in layers]
        hidden = self._patches(pixels)
        if self.pos_embed is not None:
            # Small pictures, which only keep the gradients of unused parts alive, take a crop of the grid.
            hidden = hidden + self.pos_embed[:, : hidden.shape[1], : hidden.shape[2]]
        states = {0: hidden}
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            hidden = layer(hidden)
            if number in wanted:
                states[number] = hidden
        return [states[number] for number in wanted]

    def _patches(self, pixels: Tensor) -> Tensor:
        embed = self.patch_embed if isinstance(self.patch_embed, ResidualStem) else self.patch_embed.projection
        return embed(pixels).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class RelativeAttention(SamVisionSdpaAttention):
    """SAM attention through sdpa; the table of relative positions is read on the device and not resized needlessly."""

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
        """(q_size, k_size, head width) relative position vectors."""
        length = 2 * max(q_size, k_size) - 1
        if len(rel_pos) != length:
            rel_pos = F.interpolate(rel_pos.T[None], size=length, mode="linear")[0].T
        places = torch.arange(q_size, device=rel_pos.device)
        return rel_pos[places[:, None] - places[None, :] + q_size - 1]
