"""The assembler: from a model recipe to a configuration, and from a configuration to a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xseg.config import ModelRecipe, find
from xseg.errors import UserError, did_you_mean
from xseg.models import checkpoint
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
from xseg.tokens import SpecialIds

FOLDER = "train_stages/models"
PARTS = ("segmentor", "sam", "siglip", "llm")
STORED = ("dtype", "torch_dtype")
"""How a folder's weights were stored: no size, and no reason to train in it (parameters are float32)."""


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
    segmentor = {**recipe.segmentor, "head": head, "num_labels": num_labels} if "segmentor" in parts else None
    if segmentor is not None and head != "labels":
        # Pixels can be named only where a fixed label list is.
        segmentor["pixel_classifier"] = False
    _check_sight(recipe, parts)
    return XSegConfig(
        llm_sees=recipe.llm_sees,
        llm_rows=recipe.llm_rows,
        sam_config=_part(recipe.sam, "sam") if {"segmentor", "sam"} & set(parts) else None,
        siglip_config=_part(recipe.siglip, "siglip") if "siglip" in parts else None,
        text_config=text,
        segmentor_config=segmentor,
        seg_token_id=special.seg if special else -1,
        p_open_token_id=special.p_open if special else -1,
        p_close_token_id=special.p_close if special else -1,
    )


def _check_sight(recipe: ModelRecipe, parts: Sequence[str]) -> None:
    """A language model beside image encoders must read one of them: silence about pictures is never meant."""
    built = [name for name, part in (("siglip", {"siglip"}), ("sam", {"sam", "segmentor"})) if part & set(parts)]
    if "llm" in parts and built and not set(built) & set(recipe.llm_sees):
        raise UserError(
            f"llm_sees = {recipe.llm_sees}: the stage builds none of them, only {', '.join(built)}: the language model "
            "would see no picture; add one to parts, or name what is built in llm_sees of the model recipe"
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
        _load_llm(model, folder(recipe.llm, "llm"))
    for part, kind in (("sam", config.sam_config), ("siglip", config.siglip_config)):
        given = getattr(recipe, part)
        if kind is not None and "pretrained" in given:
            checkpoint.load_part(model, part, folder(given, part))
    return model


def folder(given: dict[str, Any], part: str) -> Path:
    """Return the folder of a part's ``pretrained`` weights. Raises UserError when it is not one."""
    path = find(str(given["pretrained"]), FOLDER, suffix="")
    if not (path / "config.json").exists():
        raise UserError(f"{part}.pretrained: {path} holds no config.json: name a folder in transformers' layout")
    return path


def _load_llm(model: XSegModel, path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = model.config.text_config.vocab_size
    if loaded.get_input_embeddings().num_embeddings != rows:
        loaded.resize_token_embeddings(rows)
    state = {f"llm.{name}": value for name, value in loaded.state_dict().items()}
    report = checkpoint.assign(model, state, str(path))
    report.fresh = [name for name in report.fresh if name.startswith("llm.")]
    if report.fresh or report.unexpected or report.mismatched:
        raise UserError(f"llm.pretrained: {path} has other sizes than the model recipe\n{report}")


def _llm(given: dict[str, Any]) -> dict[str, Any]:
    sizes = _sizes(given, "llm")
    kind = sizes.get("model_type", "phi3")
    return {**XSegConfig(text_config={**sizes, "model_type": kind}).text_config.to_dict(), "model_type": kind}


def _part(given: dict[str, Any], part: str) -> dict[str, Any]:
    sizes = _sizes(given, part)
    sizes = sizes.get("vision_config", sizes)
    foreign = ("model_type", "initializer_range", *STORED) if part == "sam" else STORED
    return {k: v for k, v in sizes.items() if k not in foreign}


def _sizes(given: dict[str, Any], part: str) -> dict[str, Any]:
    """The recipe's own sizes, or, where it names nothing but a folder, those in the folder."""
    if not given:
        raise UserError(f"{part}: the stage builds it but the model recipe says nothing about it")
    sizes = {k: v for k, v in given.items() if k != "pretrained"}
    if sizes:
        return sizes
    return {k: v for k, v in AutoConfig.from_pretrained(folder(given, part)).to_dict().items() if k not in STORED}
