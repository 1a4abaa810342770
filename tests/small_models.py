"""Sizes of a model of a few thousand weights, as a model recipe gives them, and a folder of one."""

from pathlib import Path
from typing import Any

import torch

from xseg.config import ModelRecipe
from xseg.infer.processing import XSegProcessor
from xseg.models import checkpoint
from xseg.models.build import build_config, build_model

SAM = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
    "mlp_dim": 32, "window_size": 0, "global_attn_indexes": [0, 1], "output_channels": 8,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    "intermediate_size": 32,
}  # fmt: skip
LLM = {
    "model_type": "phi3", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 807, "pad_token_id": 0, "eos_token_id": 2,
    "max_position_embeddings": 1024, "original_max_position_embeddings": 1024,
}  # fmt: skip
SEGMENTOR = {
    "width": 16, "connector_width": 16, "pixel_decoder": "fpn", "num_queries": 4, "decoder_layers": 1, "heads": 2,
    "ffn": 16,
}  # fmt: skip


def save_model(folder: Path, parts: tuple[str, ...], head: str, **llm: Any) -> Path:
    """A `final` folder with random weights; ``llm`` goes over ``LLM``."""
    words_of = {"tokenizer": "examples/tiny_parts/phi", "max_tokens": 512}
    recipe = ModelRecipe(sam=SAM, siglip=SIGLIP, llm={**LLM, **llm}, segmentor=SEGMENTOR, **words_of)
    processor = XSegProcessor.from_recipe(recipe, parts)
    torch.manual_seed(0)
    words = len(processor.encoder.tokenizer) if processor.encoder else 0
    checkpoint.save(build_model(build_config(recipe, parts, head, 13, words)), folder)
    processor.save_pretrained(folder)
    return folder
