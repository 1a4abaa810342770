"""A stage's recipes -> data sets, plan, model and criterion."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xseg.data.dataset import Dataset, Preparation
from xseg.data.mixture import Plan, load_mixture
from xseg.errors import UserError
from xseg.infer.processing import XSegProcessor
from xseg.losses.criterion import Criterion
from xseg.models.build import build_config, build_model
from xseg.models.checkpoint import overlay
from xseg.train.stage import Stage
from xseg.types import Categories


@dataclass(frozen=True)
class Data:
    """What a stage trains on."""

    processor: XSegProcessor
    datasets: list[Dataset]
    factors: list[float]
    categories: Categories | None
    """The fixed label list of a linear head, or None."""


def load_data(stage: Stage) -> Data:
    """Read the annotations of the mixture. Raises UserError for missing files and for label lists that differ."""
    processor = XSegProcessor.from_recipe(stage.model, stage.recipe.parts)
    preparation = Preparation(
        processor.encoder, processor.sizes, train=True, seed=stage.recipe.seed, jitter=stage.recipe.jitter
    )
    datasets, factors = load_mixture(
        stage.mixture, root=stage.recipe.data_root, preparation=preparation, beside=stage.folder
    )
    for dataset in datasets:
        _check_first_image(dataset)
    labels = _label_list(stage, datasets) if stage.recipe.head == "labels" else None
    return Data(processor, datasets, factors, labels)


def _check_first_image(dataset: Dataset) -> None:
    """A wrong data root is told now, not after the model is built."""
    if not len(dataset):
        return
    sample = dataset.sample(0)
    for image in sample.images:
        if isinstance(image, Path) and not image.is_file():
            raise UserError(f"{sample.key}: image {image}: no such file; check data_root and the recipe")


def _label_list(stage: Stage, datasets: Sequence[Dataset]) -> Categories:
    lists = {d.source.categories for d in datasets}
    if len(lists) != 1 or None in lists:
        found = ", ".join(str(len(c.names)) if c else "none" for c in lists)
        raise UserError(
            f"head: labels: the mixture's data sets must share one label list, and they have several ({found} labels); "
            f"use head: concepts, or data sets with the same categories ({', '.join(names(stage))})"
        )
    categories = lists.pop()
    assert categories is not None
    return categories


def names(stage: Stage) -> list[str]:
    """The mixture's data sets as their recipes are called."""
    return [entry.recipe for entry in stage.mixture.datasets]


def plan(stage: Stage, data: Data, world: int) -> Plan:
    """Return the batches of the whole run."""
    lengths = [len(d) for d in data.datasets]
    r = stage.recipe
    return Plan(lengths, data.factors, r.batch_size, world=world, accumulate=r.accumulate, seed=r.seed)


def build(stage: Stage, data: Data) -> tuple[Any, str]:
    """Build the model from (recipe, seed) and lay the weights of earlier stages over it.

    Returns the model and the load report for people ("" when nothing was loaded).
    """
    encoder, recipe = data.processor.encoder, stage.recipe
    config = build_config(
        stage.model,
        recipe.parts,
        recipe.head,
        len(data.categories.names) if data.categories else 0,
        len(encoder.tokenizer) if encoder else 0,
    )
    torch.manual_seed(recipe.seed)
    model = build_model(config)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not recipe.init_from:
        return model, ""
    return model, str(overlay(model, [Path(p).expanduser() for p in recipe.init_from]))


def num_queries(model: Any) -> int:
    """Object queries N of the decoder; 0 where there is none."""
    segmentor = model.config.segmentor_config
    return int(segmentor.num_queries) if segmentor is not None else 0


def criterion(stage: Stage, data: Data) -> Criterion:
    """Return the loss of the stage."""
    return Criterion(stage.recipe.loss, data.categories.is_thing if data.categories else ())


def describe(stage: Stage) -> str:
    """The run's recipes as YAML that ``read_stage`` reads again."""
    import yaml

    recipe = stage.recipe.model_dump(mode="json", by_alias=True)
    recipe["mixture"] = json.loads(stage.mixture.model_dump_json())
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
