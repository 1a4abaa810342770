"""SigLIP and SigLIP2 (fixed resolution) from transformers, stopped at the hidden state that is read."""

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel
from transformers import initialization as init

from xseg.models.configuration import SiglipConfig
from xseg.models.stem import ResidualStem


class SiglipEncoder(SiglipVisionModel):
    """(I, 3, s, s) pixels -> (I, patches, C): hidden state ``layer``, without the final norm (X-SAM: -2).

    The blocks behind it, the final norm and the pooling head exist so that SigLIP's files load whole; in a model they
    are never computed and stay frozen.
    """

    def __init__(self, config: SiglipConfig, layer: int) -> None:
        super().__init__(config)
        self.depth = layer % (config.num_hidden_layers + 1)
        if config.stem == "residual":
            self.embeddings.patch_embedding = ResidualStem(config)  # type: ignore[assignment]
            self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside of transformers the library passes over modules without parameters of their own.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d) and self.config.stem == "residual":
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def freeze_unread(self) -> None:
        """Freeze the blocks behind the hidden state that is read, the final norm and the pooling head."""
        for module in (
            *self.encoder.layers[self.depth :],
            self.post_layernorm,
            *([self.head] if self.use_head else []),
        ):
            module.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
        """See the class. ``s`` is the config's size."""
        embed = self.embeddings
        patches = embed.patch_embedding(pixels.to(embed.position_embedding.weight.dtype))
        # through the module, as ZeRO-3 gathers a module's tensors when it is called
        hidden = patches.flatten(2).transpose(1, 2) + embed.position_embedding(embed.position_ids)
        for block in self.encoder.layers[: self.depth]:
            hidden = block(hidden, None)
        return hidden
