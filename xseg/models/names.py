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
from xseg.models import checkpoint, region_sampler
from xseg.models.configuration import SiglipConfig
from xseg.models.siglip import SiglipEncoder
from xseg.types import ViewGeometry

FOLDER, FILE = "names", "names.json"
"""Folder of the SigLIP beside a model, and what it holds beside transformers' own files."""
KIND = "siglip"
"""Model type of SigLIP, and of SigLIP 2 for pictures of one size."""
LISTED, NEW = 0.4, 0.8
"""Weight of SigLIP's word against the model's, as exponents of a geometric mean, for names that the training data list
and for others (FC-CLIP's alpha and beta)."""
POINTS = 4
"""Points of a mask that are looked at along each side of a patch."""
COVERED, TIE = 0.5, 1e-3
"""Least part of a patch that a mask must cover for it to count as the mask's; by how much at most equal parts are set
apart, for the likelier one to be chosen."""
LEAST = 1e-8
"""Least probability of a class."""
CHUNK = 64
"""Most names that are read together."""


class Names(nn.Module):
    """A whole SigLIP: names as vectors, and parts of pictures as vectors that are like those of their names."""

    def __init__(
        self, vision: SiglipEncoder, text: SiglipTextModel, tokenizer: Any, template: str, scale: float
    ) -> None:
        """``template`` holds one {} for the name, ``scale`` multiplies cosines before a softmax over names."""
        super().__init__()
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.template, self.scale = template, scale
        self._known: dict[str, Tensor] = {}

    def told(self, names: Sequence[str]) -> Tensor:
        """Return unit vectors (K, C) float32 of names; each is read once and remembered."""
        fresh = [name for name in dict.fromkeys(names) if name not in self._known]
        text: Any = self.text
        for start in range(0, len(fresh), CHUNK):
            some = fresh[start : start + CHUNK]
            # SigLIP 2 has read lower case alone
            texts = [self.template.format(name).lower() for name in some]
            length = text.config.max_position_embeddings
            ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            vectors = text(ids.input_ids.to(text.device)).pooler_output
            self._known.update(zip(some, F.normalize(vectors.float(), dim=-1), strict=True))
        return torch.stack([self._known[name] for name in names])

    def read(self, pixels: Tensor) -> Tensor:
        """(I, 3, s, s) pixels -> (I, patches, C): what the pooling head looks at."""
        vision: Any = self.vision
        return vision.post_layernorm(vision(pixels))  # type: ignore[no-any-return]

    def seen(self, rows: Tensor, masks: Tensor, views: Sequence[ViewGeometry]) -> Tensor:
        """Rows of ``read`` (I, patches, C), mask logits (I, N, h, w) on the canvases of ``views`` (I) -> unit vectors
        (I, N, C) float32: what SigLIP's pooling head makes of each part, kept from looking outside of it."""
        sizes: Any = self.vision.config
        head = self.vision.head
        side = sizes.image_size // sizes.patch_size
        held = patches(masks, views, side, side * sizes.patch_size / sizes.image_size)
        probe = head.probe.expand(*held.shape[:2], -1)
        # the head's own forward takes no mask; one True keeps a probe from a patch
        shut = (~held).repeat_interleave(head.attention.num_heads, 0)
        found = head.attention(probe, rows, rows, attn_mask=shut, need_weights=False)[0]
        return F.normalize((found + head.mlp(head.layernorm(found))).float(), dim=-1)


def load(folder: Path, size: int, template: str = "") -> Names:
    """Open a whole SigLIP in transformers' layout, in eval mode and float32.

    ``size``: side of the pictures it will be shown. Without a ``template`` it is the one in the folder's names.json.
    Raises UserError for a folder without both towers, the pooling head, a tokenizer or the temperature, for damaged
    files, pictures of another size and a template without its one {}.
    """
    if not template:
        try:
            template = str(json.loads((folder / FILE).read_text(encoding="utf8"))["template"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / FILE}: damaged ({error!r}); run `xseg names` again") from error
    check_template(template)
    config, state = _config(folder), checkpoint.read_weights(folder)
    if config.vision_config.image_size != size:
        raise UserError(
            f"{folder}: reads pictures of {config.vision_config.image_size} pixels, the model shows {size}: name a "
            "SigLIP of that size"
        )
    if "logit_scale" not in state:
        raise UserError(f"{folder}: no logit_scale, so this is no whole SigLIP: name one that has both towers")
    known = SiglipConfig().to_dict()
    fields = {
        k: v for k, v in config.vision_config.to_dict().items() if k in known and k not in ("model_type", "dtype")
    }
    vision, text = SiglipEncoder(SiglipConfig(**fields), -1), SiglipTextModel(config.text_config)
    _fill(vision, state, "vision_model.", folder)
    _fill(text, state, "text_model.", folder)
    tokenizer = _tokenizer(folder, config.text_config.vocab_size)
    return Names(vision, text, tokenizer, template, float(state["logit_scale"].float().exp())).eval()


def check_template(template: str) -> None:
    """Raise UserError for a template without exactly one place for the name."""
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise UserError(f"template {template!r}: must hold one {{}}, where the name goes, and no other brace")


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json here; name the folder of a whole SigLIP in transformers' layout")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json cannot be read ({error}); copy it again") from error
    if config.model_type != KIND:
        raise UserError(
            f"{folder}: model_type = {config.model_type!r}: must be {KIND!r}, with both towers, as google/siglip-* and "
            "google/siglip2-* for pictures of one size have it; name such a folder"
        )
    if not config.vision_config.vision_use_head:
        raise UserError(f"{folder}: no pooling head (vision_use_head: false), which texts are held against")
    return config


def _fill(tower: nn.Module, state: Mapping[str, Tensor], prefix: str, folder: Path) -> None:
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = tower.state_dict()
    wrong = [n for n in {**own, **given} if n not in own or n not in given or own[n].shape != given[n].shape]
    if wrong:
        names = ", ".join(prefix + name for name in wrong[:4])
        raise UserError(
            f"{folder}: {len(wrong)} tensors of a tower are missing, or not those of config.json: {names}, …; name a "
            "whole SigLIP"
        )
    tower.load_state_dict(given)


def _tokenizer(folder: Path, rows: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: no tokenizer that can be read: {why}; copy it from where the SigLIP is from"
        ) from error
    if tokenizer.pad_token_id is None or len(tokenizer) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} words and the pad token {tokenizer.pad_token!r}, the text "
            f"tower {rows} rows: it must have a pad token, and a row for each word; copy SigLIP's own there"
        )
    return tokenizer


def patches(masks: Tensor, views: Sequence[ViewGeometry], side: int, covered: float) -> Tensor:
    """(I, N, h, w) mask logits on the canvas -> (I, N, side * side) bool: patches of SigLIP's view that a mask holds.

    Those it covers by half; where there is none, the one it covers most. ``side`` patches cover the first part,
    ``covered``, of a side of the view. ``views`` (I,), none cut by augmentation.
    """
    steps = (torch.arange(side * POINTS, device=masks.device, dtype=torch.float32) + 0.5) / (side * POINTS) * covered
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    xy = region_sampler.on_canvas(grid.flatten(0, 1), views).unflatten(1, grid.shape[:2])
    found = F.grid_sample(masks.float().sigmoid(), 2 * xy - 1, padding_mode="zeros", align_corners=False)
    # what the canvas shows beside the image is no mask, and the grey of a padded square no image
    ends = xy.new_tensor([[v / view.canvas for v in view.scaled[::-1]] for view in views])[:, None, None]
    found = found * ((xy >= 0) & (xy <= ends)).all(-1)[:, None]
    part = F.avg_pool2d((found > 0.5).float(), POINTS).flatten(2)
    best = part + TIE * F.avg_pool2d(found, POINTS).flatten(2)
    return (part >= COVERED) | (best == best.amax(2, keepdim=True))


def ensemble(classes: Tensor, cosines: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Class logits (N, K + 1) float32, background last, and SigLIP's cosines (N, K) -> logits (N, K + 1) of both.

    Names compete by the geometric mean of both probabilities, with ``weight`` (K,) in 0..1 as SigLIP's exponent; how
    likely a query is background stays the model's own word.
    """
    background = classes.softmax(-1)[:, -1:]
    own, other = classes[:, :-1].log_softmax(-1), (cosines * scale).log_softmax(-1)
    named = ((1 - weight) * own + weight * other).softmax(-1)
    return torch.cat([named * (1 - background), background], 1).clamp(min=LEAST).log()


def weights(names: Sequence[str], listed: Sequence[str] | None, like: Tensor) -> Tensor:
    """(K,) SigLIP's exponents; without a record of what the training data ``listed`` every name counts as listed."""
    known = set(map(normalised, names if listed is None else listed))
    return like.new_tensor([LISTED if normalised(name) in known else NEW for name in names])


def normalised(name: str) -> str:
    """A name as names are compared: lower case, single spaces."""
    return " ".join(name.lower().split())
