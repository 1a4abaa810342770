"""A stage read from YAML, with everything that can be checked before a heavy library is imported."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xseg.config import FOLDERS, Mixture, ModelRecipe, StageRecipe, Suite, decode, load_recipe, merge, read_yaml
from xseg.errors import UserError
from xseg.paths import find

FSDP = {"fsdp_version": "2", "fsdp_offload_params": "false", "fsdp_activation_checkpointing": "false"}
"""What ``fsdp_config`` of a launch file may say; its other keys change nothing."""


@dataclass(frozen=True)
class Stage:
    """The decoded recipes of one training run."""

    recipe: StageRecipe
    model: ModelRecipe
    """With ``model_overrides`` laid over it."""
    mixture: Mixture
    folder: Path
    """Where the stage's file lies; names in it are looked up there too."""
    watched: Suite | None = None
    """What ``watch`` names."""

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.out).expanduser()

    def resolved(self) -> dict[str, Any]:
        """Everything the run is a function of, as plain data; names are replaced by what they stood for."""
        fields = self.recipe.model_dump(mode="json", by_alias=True)
        names = {"model": self.model.model_dump(mode="json"), "mixture": self.mixture.model_dump(mode="json")}
        return {k: v for k, v in (fields | names).items() if k != "model_overrides"}


def read_stage(name: str, overrides: Sequence[str] = ()) -> Stage:
    """Find and check a stage and the recipes it names. Raises UserError for whatever is wrong in them."""
    folder = find(name, FOLDERS[StageRecipe]).parent
    recipe = load_recipe(StageRecipe, name, overrides)
    path = find(recipe.model, FOLDERS[ModelRecipe], beside=folder)
    model = decode(ModelRecipe, merge(read_yaml(path), recipe.model_overrides), str(path))
    mixture = recipe.mixture
    if isinstance(mixture, str):
        mixture = load_recipe(Mixture, mixture, beside=folder)
    _check(recipe, name)
    watched = load_recipe(Suite, recipe.watch.suite, beside=folder) if recipe.watch else None
    return Stage(recipe, model, mixture, folder, watched)


def _check(recipe: StageRecipe, where: str) -> None:
    for group in recipe.trainable:
        try:
            re.compile(group.match)
        except re.error as error:
            raise UserError(f"{where}: trainable: match: {group.match!r} is no regular expression: {error}") from error
    for earlier in recipe.init_from:
        if not (Path(earlier).expanduser() / "config.json").is_file():
            raise UserError(
                f"{where}: init_from: {earlier!r}: no model there (looked for config.json); it must be the `final` "
                "folder of an earlier stage: run that one first, or give its folder: --set init_from='[DIR/final]'"
            )
    for key in ("batch_size", "accumulate", "log_every", "save_every", "keep_checkpoints"):
        if getattr(recipe, key) < 1:
            raise UserError(f"{where}: {key} = {getattr(recipe, key)}: must be at least 1")
    if recipe.jitter and recipe.jitter[0] > recipe.jitter[1]:
        raise UserError(f"{where}: jitter = {list(recipe.jitter)}: write the smaller factor first")
    if (recipe.steps is None and recipe.epochs <= 0) or (recipe.steps is not None and recipe.steps < 1):
        raise UserError(f"{where}: steps = {recipe.steps}, epochs = {recipe.epochs}: the run needs at least one step")


def check_fresh(stage: Stage, resume: bool) -> None:
    """Raise UserError when the run's folder holds an earlier run that nobody asked to continue."""
    done = sorted(p.name for p in (stage.out / "checkpoints").glob("step_*"))
    if not done and (stage.out / "final/config.json").is_file():
        raise UserError(
            f"out = {stage.recipe.out}: holds a finished model (final) without checkpoints to go on from, and a new "
            "run would overwrite it; give another folder with --set out=DIR, or remove final"
        )
    if done and not resume:
        raise UserError(
            f"out = {stage.recipe.out}: holds an earlier run ({', '.join(done)}), and a new one would overwrite it; "
            "add --resume auto to continue it, or give another folder with --set out=DIR"
        )


def check_fsdp(given: Mapping[str, str]) -> None:
    """Raise UserError for FSDP1, and for what accelerate would do to a model that it cuts itself.

    ``given``: keys of a launch file's ``fsdp_config``.
    """
    for key, wanted in FSDP.items():
        value = given.get(key, "1" if key == "fsdp_version" else wanted)
        if value != wanted:
            raise UserError(
                f"{key}: {value}: FSDP is supported as version 2, without offload, and with checkpointing by the "
                f"stage's gradient_checkpointing alone; set {key}: {wanted} in the launch file, or take "
                "train_stages/accelerate/fsdp2.yaml or zero3.yaml"
            )
