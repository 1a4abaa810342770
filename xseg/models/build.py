"""The assembler: from a model recipe to a configuration, and from a configuration to a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from xseg.config import ModelRecipe
from xseg.errors import UserError, did_you_mean
from xseg.models import checkpoint
from xseg.models.checkpoint import SHOWN, LoadReport
from xseg.models.configuration import SamConfig, SiglipConfig, XSegConfig
from xseg.models.xseg import XSegModel
from xseg.paths import find
from xseg.tokens import SpecialIds

FOLDER = "train_stages/models"
PARTS = ("segmentor", "sam", "siglip", "llm")
STORED = ("dtype", "torch_dtype", "quantization_config", "architectures", "_name_or_path")
"""How and where a folder's weights were stored: no size, and no reason to train in it (parameters are float32)."""
EVERY_LLM = ("rope_theta", "rope_scaling", "original_max_position_embeddings", "sliding_window", "attn_implementation")
"""Keys that any language model's section may have, whether its kind stores them by that name or not."""
KINDS: dict[str, type[PreTrainedConfig]] = {"sam": SamConfig, "siglip": SiglipConfig}
FILES = {"sam": (".pth",), "llm": (".gguf",)}
"""Single files that a part's ``pretrained`` may name."""


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
    sizes = {k: v for k, v in recipe.segmentor.items() if k != "pretrained"}
    segmentor = {**sizes, "head": head, "num_labels": num_labels} if "segmentor" in parts else None
    if segmentor is not None and head != "labels":
        # Pixels can be named only where a fixed label list is.
        segmentor["pixel_classifier"] = False
    _check_sight(recipe, parts)
    return XSegConfig(
        llm_sees=recipe.llm_sees,
        llm_rows=recipe.llm_rows,
        llm_normed_rows=recipe.llm_normed_rows,
        region_encoder=recipe.region_encoder,
        region_rows=recipe.region_rows,
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
    if recipe is not None:
        load_parts(model, recipe)
    return model


def load_parts(model: XSegModel, recipe: ModelRecipe) -> list[LoadReport]:
    """Load what the recipe's ``pretrained`` name into the parts that are built, and report each.

    Raises UserError for sources that do not fit.
    """
    config, reports = model.config, []
    if config.text_config is not None and "pretrained" in recipe.llm:
        reports.append(_load_llm(model, location(recipe.llm, "llm")))
    for part, kind in (("sam", config.sam_config), ("siglip", config.siglip_config)):
        given = getattr(recipe, part)
        if kind is not None and "pretrained" in given:
            reports.append(checkpoint.load_part(model, part, location(given, part)))
    if config.segmentor_config is not None and "pretrained" in recipe.segmentor:
        reports.append(checkpoint.load_mask2former(model, location(recipe.segmentor, "segmentor")))
    return reports


def location(given: dict[str, Any], part: str) -> Path:
    """Return the folder or file of a part's ``pretrained`` weights. Raises UserError when it is none.

    A folder is in transformers' layout; a file is SAM's own .pth or a language model's .gguf.
    """
    path = find(str(given["pretrained"]), FOLDER, suffix="")
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{part}.pretrained: {path} holds no config.json: name a folder in transformers' layout")
    if path.is_file() and path.suffix not in FILES.get(part, ()):
        known = " or ".join(["a folder in transformers' layout", *(f"a {s} file" for s in FILES.get(part, ()))])
        raise UserError(f"{part}.pretrained: {path}: name {known}")
    return path


def _load_llm(model: XSegModel, path: Path) -> LoadReport:
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(**gguf(path), dtype=torch.float32, output_loading_info=True)
    except (OSError, ImportError, SafetensorError, RuntimeError) as error:
        raise UserError(f"llm.pretrained: {path}: no language model that can be read: {error}") from error
    loaded, info = opened
    lost = [str(name) for key in ("missing_keys", "mismatched_keys") for name in info[key]]
    if lost:
        raise UserError(f"llm.pretrained: {path}: incomplete: {', '.join(lost[:SHOWN])} missing; copy it again")
    rows, there = model.config.text_config.vocab_size, loaded.get_input_embeddings().num_embeddings
    if there != rows:
        loaded.resize_token_embeddings(rows)
    state = {f"llm.{name}": value for name, value in loaded.state_dict().items()}
    report = checkpoint.assign(model, state, str(path))
    report.fresh = [name for name in report.fresh if name.startswith("llm.")]
    if report.fresh or report.unexpected or report.mismatched:
        raise UserError(f"llm.pretrained: {path} has other sizes than the model recipe\n{report}")
    if there != rows:
        report.resized = [f"llm embeddings: {there} rows there, {rows} here"]
    return report


def gguf(path: Path) -> dict[str, Any]:
    """How transformers is told of a folder, or of one .gguf file."""
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def sides(recipe: ModelRecipe, parts: Sequence[str]) -> tuple[int, int]:
    """Pixels of a side of SAM's and SigLIP's pictures; 0 where ``parts`` have none. Errors as ``build_config``."""
    encoders = (("sam", {"sam", "segmentor"}), ("siglip", {"siglip"}))
    config = build_config(recipe, [name for name, part in encoders if part & set(parts)])
    sam, siglip = config.sam_config, config.siglip_config
    return sam.image_size if sam else 0, siglip.image_size if siglip else 0


def _llm(given: dict[str, Any]) -> dict[str, Any]:
    sizes = _sizes(given, "llm")
    kind = sizes.setdefault("model_type", "phi3")
    if kind in CONFIG_MAPPING:  # else XSegConfig names it
        known = {*CONFIG_MAPPING[kind]().to_dict(), *EVERY_LLM}
        for key in given.keys() - known - {"pretrained"}:
            raise UserError(f"llm: unknown key '{key}' for model_type {kind}{did_you_mean(key, known)}")
    return {**XSegConfig(text_config={**sizes, "model_type": kind}).text_config.to_dict(), "model_type": kind}


def _part(given: dict[str, Any], part: str) -> dict[str, Any]:
    foreign = ("model_type", "initializer_range") if part == "sam" else ()
    return {k: v for k, v in _sizes(given, part).items() if k not in foreign}


def _sizes(given: dict[str, Any], part: str) -> dict[str, Any]:
    """What the folder of the pretrained weights says of them, under what the recipe itself says."""
    if not given:
        raise UserError(f"{part}: the stage builds it but the model recipe says nothing about it")
    own = {k: v for k, v in given.items() if k != "pretrained"}
    stored = _stored(given, part, needed=not own) if "pretrained" in given else {}
    if "rope_theta" in own and stored.get("rope_parameters"):
        stored["rope_parameters"] = {**stored["rope_parameters"], "rope_theta": own["rope_theta"]}
    return {**stored, **own}


def _stored(given: dict[str, Any], part: str, needed: bool) -> dict[str, Any]:
    """The configuration beside pretrained weights, which says more than sizes: norms' epsilon, angles of places.

    Nothing where it is not ``needed`` and the weights are not there yet: plans are made without them.
    """
    try:
        path = location(given, part)
    except UserError:
        if needed:
            raise
        return {}
    if path.suffix == ".pth":
        if needed:
            raise UserError(f"{part}.pretrained: {path} says no sizes: write them beside it in the model recipe")
        return {}
    config = AutoConfig.from_pretrained(**gguf(path))
    fields = (config if part == "llm" else getattr(config, "vision_config", config)).to_dict()
    # published folders have keys of older libraries
    known = fields if part == "llm" else {*KINDS[part]().to_dict()}
    return {k: v for k, v in fields.items() if k in known and k not in STORED}
