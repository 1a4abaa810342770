"""Names that no mask was ever trained for: SigLIP's texts against what its pooling head sees under a mask.

This is FC-CLIP's way to an open vocabulary (Yu et al., 2023, section 3.3) with SigLIP in the place of CLIP; X-SAM has
no words but the language model's. Nothing is trained, and the SigLIP is one of its own: that of X-SAM's stage 3 has
been trained away from its texts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, SiglipTextModel

from xseg.errors import UserError
from xseg.models import checkpoint, key_maps, region_sampler
from xseg.models.configuration import SiglipConfig
from xseg.models.siglip import SiglipEncoder
from xseg.types import ViewGeometry

FOLDER, FILE = "names", "names.json"
"""Folder of the SigLIP beside a model, and what it holds beside transformers' own files."""
TRAINED, NEW = 0.4, 0.8
"""Weight of SigLIP's word against the model's, as exponents of a geometric mean, for names that training gave masks and
for others (FC-CLIP's alpha and beta)."""
POINTS = 4
"""Points of a mask that are looked at along each side of a patch."""
COVERED = 0.5
"""Least part of a patch that a mask must cover for it to count as the mask's."""
TINY = 1e-8


class Names(nn.Module):
    """A whole SigLIP: names as vectors, and parts of pictures as vectors that are like those of their names."""

    def __init__(self, vision: SiglipEncoder, text: Any, tokenizer: Any, template: str, scale: float) -> None:
        """``template`` holds one {} for the name, ``scale`` multiplies cosines before a softmax over names."""
        super().__init__()
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.template, self.scale = template, scale
        self._known: dict[str, Tensor] = {}

    def told(self, names: Sequence[str]) -> Tensor:
        """Return unit vectors (K, C) float32 of names; each is read once and remembered."""
        fresh = [name for name in dict.fromkeys(names) if name not in self._known]
        if fresh:
            length = self.text.config.max_position_embeddings
            texts = [self.template.format(name.lower()) for name in fresh]
            ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            vectors = self.text(ids.input_ids.to(self.text.device)).pooler_output
            self._known.update(zip(fresh, F.normalize(vectors.float(), dim=-1), strict=True))
        return torch.stack([self._known[name] for name in names])

    def seen(self, pixels: Tensor, masks: Tensor, views: Sequence[ViewGeometry]) -> Tensor:
        """(I, 3, s, s) pixels, (I, N, h, w) mask logits on the canvases of ``views`` (I) -> unit vectors (I, N, C)."""
        sizes: Any = self.vision.config
        side = sizes.image_size // sizes.patch_size
        held = patches(masks, views, side, side * sizes.patch_size / sizes.image_size)
        image = torch.arange(len(pixels), device=pixels.device).repeat_interleave(masks.shape[1])
        vectors = self.vision.pooled(pixels, image, held.flatten(0, 1))
        return F.normalize(vectors.float(), dim=-1).unflatten(0, masks.shape[:2])


def load(folder: Path, template: str = "") -> Names:
    """Open a whole SigLIP in transformers' layout, in eval mode and float32.

    Without a ``template`` it is the one in the folder's names.json. Raises UserError for a folder without both towers,
    the pooling head, a tokenizer or the temperature, and for damaged files.
    """
    state = checkpoint.read_weights(folder)
    vision = _vision(folder, state)
    text, tokenizer = _text(folder)
    if text.config.projection_size != vision.config.hidden_size:
        raise UserError(
            f"{folder}: its texts have {text.config.projection_size} numbers and its pictures "
            f"{vision.config.hidden_size}: not the two towers of one SigLIP; copy it again"
        )
    if "logit_scale" not in state:
        raise UserError(f"{folder}: no logit_scale, so this is no whole SigLIP: name one that has both towers")
    if not template:
        try:
            template = str(json.loads((folder / FILE).read_text(encoding="utf8"))["template"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / FILE}: damaged ({error!r}); run `xseg names` again") from error
    return Names(vision, text, tokenizer, template, float(state["logit_scale"].float().exp())).eval()


def _vision(folder: Path, state: Mapping[str, Tensor]) -> SiglipEncoder:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        fields = config.vision_config.to_dict()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: config.json is not that of a whole SigLIP ({error}): name one with both towers"
        ) from error
    known = SiglipConfig().to_dict()
    config = SiglipConfig(**{k: v for k, v in fields.items() if k in known and k not in ("model_type", "dtype")})
    if not config.vision_use_head:
        raise UserError(
            f"{folder}: its SigLIP has no pooling head (vision_use_head: false), which texts are held against"
        )
    vision = SiglipEncoder(config, -1)
    own = {n.removeprefix("siglip."): v for n, v in key_maps.vision_tower(state, "siglip").items()}
    found = vision.load_state_dict(own, strict=False)
    if found.missing_keys or found.unexpected_keys:
        names = ", ".join([*found.missing_keys, *found.unexpected_keys][:4])
        raise UserError(f"{folder}: the vision tower is missing, or not whole: {names}, …; copy it again")
    return vision


def _text(folder: Path) -> tuple[Any, Any]:
    try:
        opened: Any = SiglipTextModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no text tower with its tokenizer: {why}; name a whole SigLIP") from error
    model, info = opened
    if info["missing_keys"]:
        names = ", ".join(sorted(map(str, info["missing_keys"]))[:4])
        raise UserError(f"{folder}: the text tower is missing, or not whole: {names}, …; name a whole SigLIP")
    return model, tokenizer


def patches(masks: Tensor, views: Sequence[ViewGeometry], side: int, covered: float = 1.0) -> Tensor:
    """(I, N, h, w) mask logits on the canvas -> (I, N, side * side) bool: patches of SigLIP's view that a mask holds.

    Those it covers by half; where there is none, the one it covers most. ``side`` patches cover the first part,
    ``covered``, of a side of the view. ``views`` (I,).
    """
    steps = (torch.arange(side * POINTS, device=masks.device, dtype=torch.float32) + 0.5) / (side * POINTS) * covered
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    xy = region_sampler.on_canvas(grid.flatten(0, 1), views).unflatten(1, grid.shape[:2])
    found = F.grid_sample(masks.float().sigmoid(), 2 * xy - 1, padding_mode="zeros", align_corners=False)
    part = F.avg_pool2d((found > 0.5).float(), POINTS).flatten(2)
    # of parts that are equally small, the likelier one
    part = part + TINY * F.avg_pool2d(found, POINTS).flatten(2)
    return (part >= COVERED) | (part == part.amax(2, keepdim=True))


def ensemble(classes: Tensor, cosines: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Class logits (N, K + 1), background last, and SigLIP's cosines (N, K) -> logits (N, K + 1) of both.

    Names compete by the geometric mean of both probabilities, with ``weight`` (K,) in 0..1 as SigLIP's exponent; how
    likely a query is background stays the model's own word.
    """
    classes = classes.float()
    background = classes.softmax(-1)[:, -1:]
    own, other = classes[:, :-1].log_softmax(-1), (cosines * scale).log_softmax(-1)
    named = ((1 - weight) * own + weight * other).softmax(-1)
    return torch.cat([named * (1 - background), background], 1).clamp(min=TINY).log()


def weights(names: Sequence[str], trained: Sequence[str] | None, like: Tensor) -> Tensor:
    """(K,) SigLIP's exponents; without a record of what was ``trained`` every name counts as trained."""
    known = set(map(normalised, names if trained is None else trained))
    return like.new_tensor([TRAINED if normalised(name) in known else NEW for name in names])


def normalised(name: str) -> str:
    """A name as names are compared: lower case, single spaces."""
    return " ".join(name.lower().split())
