"""A stage's recipes -> data sets, plan, model and criterion."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xseg.config import DataRecipe, load_recipe
from xseg.data.dataset import Dataset, Preparation
from xseg.data.mixture import Alike, Plan, alike, load_mixture
from xseg.errors import UserError
from xseg.infer.processing import XSegProcessor, stated
from xseg.losses.criterion import Criterion
from xseg.models import adapters
from xseg.models.build import build_config, build_model, load_parts
from xseg.models.checkpoint import LoadReport
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
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
    alike: Alike | None = None
    """The samples' lengths, where batches are sorted by them."""


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
        _check_head(stage, dataset)
    processor.speaks_first = sorted({dataset.task.name for dataset in datasets if dataset.task.speaks_first})
    processor.learnt = _with_earlier(stage, "learnt", {dataset.task.name for dataset in datasets})
    lists = [dataset.sample(0).categories for dataset in datasets if len(dataset)]
    processor.categories = _with_earlier(stage, "categories", {name for c in lists if c for name in c.names})
    labels = _label_list(stage, datasets) if stage.recipe.head == "labels" else None
    return Data(processor, datasets, factors, labels, alike(stage.mixture, datasets))


def _with_earlier(stage: Stage, key: str, own: set[str]) -> list[str] | None:
    """What this mixture and the stages before trained on; None where one of those does not say."""
    found = set(own)
    for earlier in stage.recipe.init_from:
        before = stated(Path(earlier).expanduser(), key)
        if before is None:
            return None
        found.update(before)
    return sorted(found)


def _check_first_image(dataset: Dataset) -> None:
    """A wrong data root is told now, not after the model is built."""
    if not len(dataset):
        return
    sample = dataset.sample(0)
    for image in sample.images:
        if isinstance(image, Path) and not image.is_file():
            raise UserError(f"{sample.key}: image {image}: no such file; check data_root and the recipe")


def _check_head(stage: Stage, dataset: Dataset) -> None:
    """A linear head answers queries without concepts, a concept head queries with them."""
    queries = dataset.format(0).queries if len(dataset) else ()
    head = stage.recipe.head
    if any(bool(query.concepts) == (head == "labels") for query in queries):
        other, asks = ("concepts", "by text") if head == "labels" else ("labels", "for a fixed label list")
        raise UserError(
            f"head: {head}: the task of {dataset.sample(0).key} asks {asks}; set head: {other}, or give that data set "
            "another task (option labels: fixed belongs to head: labels)"
        )


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


def tasks(stage: Stage) -> list[str]:
    """The task of each of the mixture's data sets."""
    entries = stage.mixture.datasets
    return [(e.task or load_recipe(DataRecipe, e.recipe, beside=stage.folder).task).name for e in entries]


def plan(stage: Stage, data: Data, world: int) -> Plan:
    """Return the batches of the whole run."""
    lengths = [len(d) for d in data.datasets]
    r, mixed = stage.recipe, stage.mixture.batches == "mixed"
    return Plan(lengths, data.factors, r.batch_size, world, r.accumulate, r.seed, mixed, data.alike)


def configuration(stage: Stage, data: Data) -> XSegConfig:
    """Return the sizes of the stage's model."""
    encoder, recipe = data.processor.encoder, stage.recipe
    return build_config(
        stage.model,
        recipe.parts,
        recipe.head,
        len(data.categories.names) if data.categories else 0,
        len(encoder.tokenizer) if encoder else None,
        encoder.special if encoder else None,
    )


def skeleton(config: XSegConfig, given: adapters.Adapters | None = None) -> XSegModel:
    """Build the model, with adapters, without memory for its weights: names and shapes."""
    with torch.device("meta"):
        model = build_model(config)
        adapters.attach(model, given or {})
    return model


def build(stage: Stage, config: XSegConfig) -> tuple[XSegModel, list[LoadReport]]:
    """Build the model from (recipe, seed), its pretrained parts and the weights of earlier stages; report each.

    Adapters stand beside what was loaded. Raises UserError for weights that do not fit.
    """
    torch.manual_seed(stage.recipe.seed)
    model = build_model(config)
    reports = load_parts(model, stage.model)
    reports += adapters.overlay(model, [Path(p).expanduser() for p in stage.recipe.init_from])
    given = stage.recipe.adapters or {}
    adapters.check_loaded(model, given, reports)
    adapters.attach(model, given)
    if stage.recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, reports


def num_queries(config: XSegConfig) -> int:
    """Object queries N of the decoder; 0 where there is none."""
    segmentor = config.segmentor_config
    return int(segmentor.num_queries) if segmentor is not None else 0  # type: ignore[union-attr]


def criterion(stage: Stage, data: Data) -> Criterion:
    """Return the loss of the stage."""
    return Criterion(stage.recipe.loss, data.categories.is_thing if data.categories else ())


def describe(stage: Stage) -> str:
    """The run's recipes as YAML that ``read_stage`` reads again."""
    import yaml

    recipe = stage.recipe.model_dump(mode="json", by_alias=True)
    recipe["mixture"] = json.loads(stage.mixture.model_dump_json())
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
