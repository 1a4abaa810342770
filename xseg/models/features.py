"""What the image encoders hand on, kept apart so that a session can hold it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """What the encoders say about I images; a session keeps it. None = not computed or no such part."""

    rows: Tensor | None
    """(I, r, D) rows of the language model: SigLIP's first, then SAM's."""
    cells: Tensor | None
    """(I, h, w, D) the rows of one encoder as a map, for visual prompts (``region_encoder``)."""
    maps: tuple[Tensor, list[Tensor]] | None
    """Mask features (I, d, h, w) and the maps for the mask decoder."""
