"""A zero that reaches every part a batch did not use.

Under ZeRO a part without a gradient on one rank stops or corrupts the others, and ZeRO-3 applies the last gradient
again. So each unused part runs once on something tiny, through its modules, and its output is multiplied by zero. It
runs where it would have run if it were used: ZeRO-2 adds up what the ranks' gradients come to in the order in which
they come, and ZeRO-3 gathers weights in the order in which modules run, so that order must not depend on the batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xseg.models import llm
from xseg.models.features import ImageFeatures
from xseg.models.mask_decoder import Groups
from xseg.types import ModelOutput

if TYPE_CHECKING:
    from xseg.models.xseg import XSegModel


CELLS = 4
"""SAM cells a side of what unused parts see: two are left on the coarsest map; a group norm refuses a single one."""


def touched(model: "XSegModel", output: ModelOutput, features: ImageFeatures, hidden: Tensor | None) -> ModelOutput:
    """``output`` with its ``touch``."""
    zeros = [corner(output.lm_logits), corner(output.mask_logits), output.class_logits[..., -1].sum() * 0]
    if hidden is not None:
        # Row 0 of any sample has passed every layer.
        zeros.append(corner(hidden[:, :1]))
    if features.rows is not None:
        zeros.append(corner(features.rows))
    if output.pixel_logits is not None:
        zeros.append(corner(output.pixel_logits))
    elif features.maps is not None and not output.mask_logits.shape[1]:
        zeros += _decoder(model, features.maps)
    total = torch.stack([z.float() for z in zeros]).sum()
    return dataclasses.replace(output, touch=total)


def corner(x: Tensor) -> Tensor:
    """Zero with a path to ``x``; of large tensors only the first cells are read."""
    if x.numel() == 0:
        return x.sum() * 0
    for dim in range(2, x.dim()):
        x = x.narrow(dim, 0, 1)
    return x.sum() * 0


def corners(states: Sequence[Tensor]) -> list[Tensor]:
    """A few cells of SAM's states (I, h, w, C) of the first picture."""
    return [state[:1, :CELLS, :CELLS] for state in states]


def black(model: "XSegModel") -> list[Tensor]:
    """Pixels of a black picture, (1, 3, s, s): whole for SigLIP, whose positions have one size; a few cells for SAM."""
    siglip, sam = model.config.siglip_config, model.config.sam_config
    sides = siglip.image_size if siglip else 0, sam.patch_size * CELLS if sam else 0
    return [torch.zeros(1, 3, side, side, device=model.device) for side in sides]


def words(model: "XSegModel") -> Tensor:
    """States (1, 1, D) of a text of one word."""
    rows = model.llm.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return llm.hidden_states(model.llm, rows)


def _decoder(model: "XSegModel", maps: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    """One query on the first picture through projection, mask decoder and class head."""
    zero = torch.zeros(1, dtype=torch.long, device=model.device)
    seg = concepts = real = None
    if model.config.segmentor_config.head == "concepts":
        if hasattr(model, "llm"):
            state = torch.zeros(1, model.config.width, device=model.device, dtype=model.dtype)
            seg = model.llm_projector(state)
        concepts, real = model.background[None], zero[None] == 0
    one = maps[0][:1], [m[:1] for m in maps[1]]
    masks, classes = model.segmentor.decode(one, seg, concepts, real, Groups(zero, 1, 1))
    zeros = [corner(masks), corner(classes)]
    if model.config.segmentor_config.pixel_classifier:
        zeros.append(corner(model.segmentor.pixel_classifier(one[0])))
    return zeros
