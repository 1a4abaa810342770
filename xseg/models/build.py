"""The assembler: from a model recipe to a configuration, and from a configuration to a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xseg.config import ModelRecipe, find
from xseg.errors import UserError, did_you_mean
from xseg.models import checkpoint
from xseg.models.configuration import SamConfig, XSegConfig
from xseg.models.xseg import XSegModel
from xseg.tokens import SpecialIds

FOLDER = "train_stages/models"
PARTS = ("segmentor", "sam", "siglip", "llm")


def build_config(
    recipe: ModelRecipe,
    parts: Sequence[str],
    head: str = "concepts",
    num_labels: int = 0,
    vocab_size: int | None = None,
    special: SpecialIds | None = None,
) -> XSegConfig:
    """The sizes of the parts that a stage builds.

    ``vocab_size``: rows of the embedding, normally ``len(tokenizer)``; None keeps the recipe's. ``special``: ids of
    ``<SEG>``, ``<p>``, ``</p>``; by default the last three. Raises UserError for unknown parts and keys.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"parts: {part!r} is none{did_you_mean(part, PARTS)}")
    text = _llm(recipe.llm) if "llm" in parts else None
    if text is not None:
        text = {**text, "vocab_size": vocab_size or text["vocab_size"]}
        last = text["vocab_size"]
        special = special or SpecialIds(last - 3, last - 2, last - 1)
    segmentor = None
    if "segmentor" in parts:
        segmentor = {"num_labels": num_labels, **recipe.segmentor, "head": head}
        if head == "labels" or segmentor.get("pixel_classifier"):
            segmentor["num_labels"] = num_labels
    return XSegConfig(
        sam_config=_part(recipe.sam, "sam") if {"segmentor", "sam"} & set(parts) else None,
        siglip_config=_part(recipe.siglip, "siglip") if "siglip" in parts else None,
        text_config=text,
        segmentor_config=segmentor,
        seg_token_id=special.seg if special else -1,
        p_open_token_id=special.p_open if special else -1,
        p_close_token_id=special.p_close if special else -1,
    )


def build_model(config: XSegConfig, recipe: ModelRecipe | None = None) -> XSegModel:
    """A model with random weights; with ``recipe`` the weights of its ``pretrained`` folders are loaded.

    Works under ``torch.device("meta")``. The language model's embedding is resized to the configuration's rows.
    Raises UserError for a folder whose sizes differ.
    """
    model = XSegModel(config)
    if recipe is None:
        return model
    if config.text_config is not None and "pretrained" in recipe.llm:
        loaded = AutoModelForCausalLM.from_pretrained(folder(recipe.llm, "llm"), dtype=torch.float32)
        if loaded.get_input_embeddings().num_embeddings != config.text_config.vocab_size:
            loaded.resize_token_embeddings(config.text_config.vocab_size)
        model.llm.load_state_dict(loaded.state_dict())
    for part, kind in (("sam", config.sam_config), ("siglip", config.siglip_config)):
        given = getattr(recipe, part)
        if kind is not None and "pretrained" in given:
            checkpoint.load_part(model, part, folder(given, part))
    return model


def folder(given: dict[str, Any], part: str) -> Path:
    """The folder of a part's ``pretrained`` weights."""
    path = find(str(given["pretrained"]), FOLDER, suffix="")
    if not (path / "config.json").exists():
        raise UserError(f"{part}.pretrained: {path} holds no config.json: name a folder in transformers' layout")
    return path


def _llm(given: dict[str, Any]) -> dict[str, Any]:
    if not given:
        raise UserError("llm: the stage builds a language model but the model recipe says nothing about it")
    sizes = {k: v for k, v in given.items() if k != "pretrained"}
    if "pretrained" in given:
        sizes = {**AutoConfig.from_pretrained(folder(given, "llm")).to_dict(), **sizes}
    kind = sizes.get("model_type", "phi3")
    return {**XSegConfig(text_config={**sizes, "model_type": kind}).text_config.to_dict(), "model_type": kind}


def _part(given: dict[str, Any], part: str) -> dict[str, Any]:
    if not given:
        raise UserError(f"{part}: the stage builds it but the model recipe says nothing about it")
    sizes = {k: v for k, v in given.items() if k != "pretrained"}
    if "pretrained" not in given:
        return sizes
    stored = AutoConfig.from_pretrained(folder(given, part))
    stored = getattr(stored, "vision_config", stored).to_dict()
    known = SamConfig().to_dict() if part == "sam" else stored
    return {**{k: v for k, v in stored.items() if k in known and k not in ("model_type",)}, **sizes}
