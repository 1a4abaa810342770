"""SigLIP and SigLIP2 (fixed resolution) from transformers, stopped at the hidden state that is read."""

from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel


class SiglipEncoder(SiglipVisionModel):
    """(I, 3, s, s) pixels -> (I, patches, C): hidden state ``layer``, without the final norm (X-SAM: -2).

    The blocks behind it, the final norm and the pooling head exist so that SigLIP's files load whole; they are never
    computed and stay frozen.
    """

    def __init__(self, config: SiglipVisionConfig, layer: int) -> None:
        super().__init__(config)
        self.depth = layer % (config.num_hidden_layers + 1)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside of transformers the library passes over modules without parameters of their own.
        super()._initialize_weights(module)

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
        hidden = self.embeddings(pixels)
        for block in self.encoder.layers[: self.depth]:
            hidden = block(hidden, None)
        return hidden
