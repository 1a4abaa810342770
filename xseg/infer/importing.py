"""``xseg import``: a released X-SAM checkpoint becomes a folder that ``xseg.load`` opens."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from xseg.config import ModelRecipe, load_recipe
from xseg.errors import UserError
from xseg.infer.processing import XSegProcessor
from xseg.models import checkpoint, key_maps, released, shards
from xseg.models.build import build_config, build_model, location
from xseg.models.checkpoint import LoadReport
from xseg.models.configuration import XSegConfig
from xseg.models.released import EMBEDDING, LABELS, OUTPUT, QUERIES, Released
from xseg.models.shards import Stored

REPORT = "load_report.json"


@dataclass(frozen=True)
class Import:
    """What is asked for."""

    source: Path
    """A ``pytorch_model.bin`` (wrapped or not), safetensors, a folder of shards, ZeRO's or the export for chat."""
    out: Path
    recipe: str = "paper"
    """Model recipe: the sizes that shapes do not tell. Vocabulary, labels and object queries are the checkpoint's."""
    tokenizer: str = ""
    """Replaces the recipe's tokenizer."""
    lora_alpha: float = 0.0
    """Scale of a LoRA checkpoint; it is merged with alpha / rank."""


def import_xsam(asked: Import) -> LoadReport:
    """Write ``asked.out``: safetensors in the checkpoint's own dtype, config, processor and the report.

    The source is never held in memory as a whole. Raises UserError, and leaves ``out`` as it was, where that holds
    anything, and for sources that are damaged, incomplete, of another architecture or vocabulary, or that hold code.
    """
    found = released.inspect(asked.source)
    checkpoint.check_place(asked.out)
    parts = found.parts
    recipe = _recipe(asked, found)
    processor = XSegProcessor.from_recipe(recipe, parts)
    base = _base(recipe) if found.adapters else {}
    _check_vocabulary(found, base, processor)
    config = _config(found, recipe, parts, processor)
    with torch.device("meta"):
        skeleton = build_model(config)
    pieces, report = released.plan(found, skeleton, base, asked.lora_alpha)
    config.architectures, config.dtype = [type(skeleton).__name__], found.dtype
    with checkpoint.replacing(asked.out) as partial:
        partial.mkdir(parents=True)
        released.write(pieces, partial, asked.lora_alpha, shards.LIMIT)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / REPORT).write_text(json.dumps([asdict(report)], indent=1), encoding="utf8")
    return report


def _recipe(asked: Import, found: Released) -> ModelRecipe:
    overrides = [f"tokenizer={json.dumps(asked.tokenizer)}"] if asked.tokenizer else []
    queries = found.rows(QUERIES)
    overrides += [f"segmentor.num_queries={queries}"] if queries else []
    return load_recipe(ModelRecipe, asked.recipe, overrides)


def _base(recipe: ModelRecipe) -> Mapping[str, Stored]:
    """What a LoRA checkpoint does not hold: the frozen language model and image encoder, as the recipe names them."""
    out: dict[str, Stored] = {}
    for given, part, prefix in ((recipe.llm, "llm", "llm."), (recipe.siglip, "siglip", "vision_encoder.")):
        if "pretrained" in given:
            stored = shards.catalog(location(given, part))
            out |= {key_maps.unified(prefix + name): tensor for name, tensor in stored.items()}
    return out


def _check_vocabulary(found: Released, base: Mapping[str, Stored], processor: XSegProcessor) -> None:
    """The embedding has one row for each word of the tokenizer, xseg's three included; the output layer as many."""
    if processor.encoder is None:
        return
    tokenizer = processor.encoder.tokenizer
    for name in (EMBEDDING, OUTPUT):
        rows = found.rows(name)
        if rows is None and name in base and found.adapters:
            rows = base[name].shape[0]
        if rows is not None and rows != len(tokenizer):
            raise UserError(
                f"{found.source}: wrong vocabulary: {name} has {rows} rows and the tokenizer {tokenizer.name_or_path} "
                f"{len(tokenizer)} words (<SEG>, <p>, </p> included): name the one it was trained with by --tokenizer"
            )


def _config(found: Released, recipe: ModelRecipe, parts: list[str], processor: XSegProcessor) -> XSegConfig:
    labels = found.rows(LABELS) if "llm" not in parts else None
    encoder = processor.encoder
    return build_config(
        recipe,
        parts,
        "labels" if labels else "concepts",
        labels - 1 if labels else 0,
        len(encoder.tokenizer) if encoder else None,
        encoder.special if encoder else None,
    )
