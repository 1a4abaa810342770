"""Start values of the parts that are not transformers models of their own."""

import math

import torch
from torch import nn
from transformers import initialization as init

from xseg.models.class_head import START_TEMPERATURE, ConceptHead
from xseg.models.connector import Level
from xseg.models.mask_decoder import DecoderLayer
from xseg.models.pixel_decoder import DeformableAttention, DeformablePixelDecoder


def initialise(module: nn.Module) -> None:
    """Initialise one module: Mask2Former's values, the connector's 0.02, torch's own for projectors and heads."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None:
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ConceptHead):
        init.constant_(module.logit_scale, math.log(START_TEMPERATURE))
    elif isinstance(module, DeformableAttention):
        _deformable(module)
    elif isinstance(module, Level):
        for conv in (module.conv1, module.conv2, module.conv3):
            init.normal_(conv.weight, std=0.02)
    elif isinstance(module, DecoderLayer):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                init.xavier_uniform_(parameter)
    elif isinstance(module, DeformablePixelDecoder):
        init.normal_(module.level_embed)


def _deformable(module: DeformableAttention) -> None:
    """Each head looks in its own direction, each point one step further."""
    angle = torch.arange(module.n_heads, dtype=torch.float32) * (2 * math.pi / module.n_heads)
    way = torch.stack((angle.cos(), angle.sin()), -1)
    way = way / way.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, module.n_points + 1, dtype=torch.float32)
    grid = way[:, None, None] * steps[:, None]
    init.zeros_(module.sampling_offsets.weight)
    init.copy_(module.sampling_offsets.bias, grid.expand(-1, module.n_levels, -1, -1).reshape(-1))
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)
    for layer in (module.value_proj, module.output_proj):
        init.xavier_uniform_(layer.weight)
        init.zeros_(layer.bias)
