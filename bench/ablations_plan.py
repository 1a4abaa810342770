"""What ``bench/ablations.py`` compares: rows, the trainings behind them, sizes, and what a result depends on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from xseg.config import DataRecipe, ModelRecipe, Recipe, Suite, decode, load_recipe, merge, parse_override, read_yaml
from xseg.errors import UserError, did_you_mean
from xseg.paths import find
from xseg.train.stage import Stage, read_stage
from xseg.train.state import FREE

HERE = Path(__file__).resolve().parent / "ablations"
SCHEDULED = {"stage", "steps", "epochs"}
"""Keys that a resumed run may change, but that a result depends on."""


class Settings(Recipe):
    """Sizes of all runs; see settings.yaml."""

    images: int
    val_images: int
    side: int
    data_seed: int
    seeds: list[int]
    steps: dict[str, int]
    eval_batch: int
    max_seconds: float
    sets: list[str] = Field(default_factory=list)

    def steps_of(self, training: str) -> int:
        """Steps of a training: its own, or those of its stage."""
        stage = training.split("_")[0]
        if training not in self.steps and stage not in self.steps:
            raise UserError(f"settings: steps has neither {training} nor {stage}: add one")
        return self.steps.get(training, self.steps.get(stage, 0))


class Training(Recipe):
    """A stage recipe and where it starts."""

    recipe: str = ""
    """Stage recipe beside rows.yaml; by default called as the training."""
    after: list[str] = Field(default_factory=list)
    """Trainings whose weights are overlaid, in this order."""


class Row(Recipe):
    """One line of a table."""

    training: str
    paper: dict[str, float] = Field(default_factory=dict)
    """metric -> X-SAM's number."""
    metrics: list[str] | None = None
    """Metrics of the group that this row is compared on; None = all."""


class Group(Recipe):
    """Rows that are compared with each other; the last one is the full method."""

    title: str
    table: str
    """The paper's table."""
    note: str = ""
    metrics: dict[str, str]
    """metric here -> what stands for it in the paper's table, or "none"."""
    rows: dict[str, Row]

    def read_by(self, row: str) -> list[str]:
        """The metrics a row is compared on."""
        given = self.rows[row].metrics
        return list(self.metrics) if given is None else given


class Plan(Recipe):
    """rows.yaml."""

    trainings: dict[str, Training]
    groups: dict[str, Group]

    def rows(self) -> dict[str, Row]:
        """All rows of all groups."""
        return {name: row for group in self.groups.values() for name, row in group.rows.items()}

    def row(self, name: str) -> Row:
        """A row by name. Raises UserError when there is none."""
        rows = self.rows()
        if name not in rows:
            raise UserError(f"--row {name}: no such row or group{did_you_mean(name, [*rows, *self.groups])}")
        return rows[name]

    def chosen(self, names: list[str]) -> list[str]:
        """Rows by their names and those of their groups; all when none is named."""
        found = [row for name in names for row in (self.groups[name].rows if name in self.groups else [name])]
        for name in found:
            self.row(name)
        return found or list(self.rows())

    def lineage(self, training: str) -> list[str]:
        """A training behind all it starts from, each once."""
        if training not in self.trainings:
            raise UserError(f"rows.yaml: no training {training!r}{did_you_mean(training, self.trainings)}")
        earlier = [name for parent in self.trainings[training].after for name in self.lineage(parent)]
        return list(dict.fromkeys([*earlier, training]))

    def recipe(self, training: str) -> Path:
        """The stage recipe of a training."""
        return HERE / f"{self.trainings[training].recipe or training}.yaml"


def read_plan() -> Plan:
    """Read rows.yaml."""
    path = HERE / "rows.yaml"
    return decode(Plan, read_yaml(path), str(path))


def read_settings(path: Path, overrides: Sequence[str]) -> Settings:
    """Read a settings file; ``overrides`` are ``key.sub=value``."""
    if not path.is_file():
        raise UserError(f"--settings {path}: no such file; the sizes of the real runs are in {HERE / 'settings.yaml'}")
    data = read_yaml(path)
    for item in overrides:
        data = merge(data, parse_override(item))
    return decode(Settings, data, str(path))


def stage_of(plan: Plan, settings: Settings, training: str, seed: int) -> Stage:
    """A training's stage as it will run, but for its folders."""
    keys = ["init_from=[]", f"seed={seed}", f"steps={settings.steps_of(training)}", *settings.sets]
    return read_stage(str(plan.recipe(training)), keys)


def fingerprint(plan: Plan, settings: Settings, training: str, seed: int) -> str:
    """Short hash of all recipes, sizes and pretrained weights behind a result; code is named by its commit instead."""
    parts: list[Any] = [settings.images, settings.val_images, settings.side, settings.data_seed, seed]
    parts.append(suite().model_dump(mode="json"))
    for name in plan.lineage(training):
        stage = stage_of(plan, settings, name, seed)
        parts.append({k: v for k, v in stage.resolved().items() if k not in FREE - SCHEDULED})
        recipes = [load_recipe(DataRecipe, entry.recipe, beside=stage.folder) for entry in stage.mixture.datasets]
        parts += [recipe.model_dump(mode="json") for recipe in recipes]
        parts += weights(stage.model)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def suite() -> Suite:
    """What rows are scored on."""
    return load_recipe(Suite, str(HERE / "suite.yaml"))


def weights(model: ModelRecipe) -> list[str]:
    """Hashes of the pretrained files that a model starts from."""
    given = [part["pretrained"] for part in (model.sam, model.siglip, model.llm) if "pretrained" in part]
    folders = [find(str(name), "train_stages/models", suffix="") for name in given]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
