"""Random weights start where training needs them to."""

import math

import torch
from model_cases import config

from xseg.models.build import build_model

torch.set_num_threads(1)


def test_start_values_of_our_own_parts() -> None:
    made = build_model(config(pixel_decoder="deformable"))
    decoder = made.segmentor.mask_decoder
    bound = math.sqrt(6 / (32 + 32))
    assert 0.9 * bound < decoder.layers[0].cross_attn.q_proj.weight.abs().max() <= bound
    assert 0.8 < decoder.queries_features.weight.std() < 1.2
    assert 0.015 < made.segmentor.connector.levels[0].conv2.weight.std() < 0.025
    assert made.segmentor.class_head.logit_scale.item() == torch.tensor(1 / 0.07).log().item()
    attention = made.segmentor.pixel_decoder.layers[0].self_attn
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
    offsets = attention.sampling_offsets.bias.view(2, 3, 4, 2)
    # Heads look in opposite directions, and point k lies k cells away.
    assert torch.allclose(offsets[0], -offsets[1], atol=1e-6)
    assert offsets[0, 0, :, 0].tolist() == [1, 2, 3, 4]


def test_start_values_of_the_encoders() -> None:
    made = build_model(config())
    sam = made.segmentor.sam
    assert 0.015 < sam.layers[0].attn.qkv.weight.std() < 0.025
    assert sam.pos_embed.std() > 0.01
    assert not sam.layers[0].attn.rel_pos_h.any()
    assert 0.1 < made.siglip.encoder.layers[0].self_attn.q_proj.weight.std() < 0.3
    rows = made.encode_images(torch.randn(2, 3, 16, 16), torch.randn(2, 3, 32, 32)).rows
    assert (rows[0] - rows[1]).abs().mean() > 0.05
