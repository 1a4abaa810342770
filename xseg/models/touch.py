"""A zero that reaches every part a batch did not use.

Under ZeRO a part without a gradient on one rank stops or corrupts the others, and ZeRO-3 applies the last gradient
again. So each unused part runs once on something small, through its modules, and its output is multiplied by zero.

DeepSpeed adds the ranks' gradients up in the order in which each rank gets them, whatever their names, and ZeRO-3
counts on every module running as often as on the other ranks, in the same order. So what stands before the language
model runs there, and once, whatever a batch holds: ``XSegModel.encode_images`` sees to it.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xseg.models import llm
from xseg.models.features import ImageFeatures
from xseg.models.mask_decoder import Groups
from xseg.types import ModelOutput

if TYPE_CHECKING:
    from xseg.models.xseg import XSegModel


def touched(model: "XSegModel", output: ModelOutput, features: ImageFeatures, hidden: Tensor | None) -> ModelOutput:
    """``output`` with its ``touch``."""
    zeros = [corner(output.lm_logits), corner(output.mask_logits), output.class_logits[..., -1].sum() * 0]
    if hidden is None and hasattr(model, "llm"):
        hidden = _words(model)
        zeros.append(corner(model.llm.get_output_embeddings()(hidden[:, 0])))
        if hasattr(model, "llm_projector"):
            zeros.append(corner(model.llm_projector(hidden[:, 0])))
    if hidden is not None:
        # Row 0 of any sample has passed every layer.
        zeros.append(corner(hidden[:, :1]))
    spare = features.spare
    if features.rows is None and spare is None and hasattr(model, "llm"):
        spare = picture(model)
    zeros += [corner(f.rows) for f in (features, spare) if f is not None and f.rows is not None]
    if features.maps is None and spare is not None and spare.maps is not None:
        zeros += _decoder(model, spare)
    elif output.pixel_logits is not None:
        zeros.append(corner(output.pixel_logits))
    total = torch.stack([z.float() for z in zeros]).sum()
    return dataclasses.replace(output, touch=total)


def corner(x: Tensor) -> Tensor:
    """Zero with a path to ``x``; of large tensors only the first cells are read."""
    if x.numel() == 0:
        return x.sum() * 0
    for dim in range(2, x.dim()):
        x = x.narrow(dim, 0, 1)
    return x.sum() * 0


def _words(model: "XSegModel") -> Tensor:
    rows = model.llm.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return llm.hidden_states(model.llm, rows, torch.ones(1, 1, dtype=torch.bool, device=model.device))


def picture(model: "XSegModel") -> ImageFeatures:
    """Features of a black picture; SAM's is of a few cells."""
    siglip, sam = model.config.siglip_config, model.config.sam_config
    # At another size SigLIP would read its table of positions past the module that ZeRO-3 gathers it for. Four SAM
    # cells a side leave two on the coarsest map: a group norm refuses a single one.
    sides = (siglip.image_size if siglip is not None else 0, sam.patch_size * 4 if sam is not None else 0)
    small, large = (torch.zeros(1, 3, side, side, device=model.device) for side in sides)
    return model.encode_images(small, large)


def _decoder(model: "XSegModel", spare: ImageFeatures) -> list[Tensor]:
    """One query through mask decoder, class head and projection."""
    assert spare.maps is not None
    zero = torch.zeros(1, dtype=torch.long, device=model.device)
    seg = concepts = real = None
    if model.config.segmentor_config.head == "concepts":
        if hasattr(model, "llm"):
            state = torch.zeros(1, model.config.width, device=model.device, dtype=model.dtype)
            seg = model.llm_projector(state)
        concepts, real = model.background[None], zero[None] == 0
    masks, classes = model.segmentor.decode(spare.maps, seg, concepts, real, Groups(zero, 1, 1))
    zeros = [corner(masks), corner(classes)]
    if model.config.segmentor_config.pixel_classifier:
        zeros.append(corner(model.segmentor.pixel_classifier(spare.maps[0])))
    return zeros
