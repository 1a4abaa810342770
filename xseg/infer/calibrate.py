"""The probability below which a phrase is "not there", chosen on data with absent things and kept with the model.

Which value that is differs from model to model: how sure a model is of a phrase depends on how it was trained. It is
chosen where "not there" is right as often as "there" is (the mean of the two shares is largest) and must not be chosen
on the data it is reported on, so splits called "test" are refused.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from xseg.config import DataRecipe, SuiteRow, TaskSpec, load_recipe
from xseg.errors import UserError
from xseg.infer.evaluate import Progress, open_row, predict
from xseg.infer.predictor import Predictor
from xseg.infer.processing import FILE, Calibration
from xseg.metrics.presence import Presence
from xseg.tasks import load_task


@dataclass(frozen=True)
class Asked:
    """On what a threshold is chosen."""

    recipe: str
    """A data recipe of a task that can refuse a phrase, in whose split some phrases have no target."""
    data_root: Path
    limit: int | None = None
    """Use the first samples only."""
    batch_size: int = 8


def calibrate(predictor: Predictor, asked: Asked, progress: Progress = lambda *_: None) -> Calibration:
    """Choose the threshold of a model on the samples of a recipe; the model's own threshold plays no part in it.

    Raises UserError for a test split, a task that refuses nothing, a model that cannot do it, and a split in which
    every phrase has a target or none has one.
    """
    recipe = load_recipe(DataRecipe, asked.recipe)
    if recipe.split.startswith("test"):
        raise UserError(
            f"{asked.recipe}: split {recipe.split}: a threshold chosen on test data makes the figures of that data "
            "worthless; name a training or validation split"
        )
    dataset = open_row(predictor, SuiteRow(recipe=asked.recipe, limit=asked.limit), asked.data_root)
    # of the tasks that may refuse a phrase, those that leave the threshold to the model unless a recipe names one
    if dataset is None or getattr(load_task(TaskSpec(name=recipe.task.name)), "reject", 0.0) is not None:
        raise UserError(
            f"{asked.recipe}: task {recipe.task.name}: needs a task that takes the model's threshold, such as "
            "refer_seg, and a model that reads text and writes masks (stage 3)"
        )
    metric, seen = Presence(), 0
    while seen < len(dataset):
        indices = range(seen, min(seen + asked.batch_size, len(dataset)))
        for sample, prediction in predict(predictor, dataset, indices):
            metric.update(prediction, sample)
        seen = indices.stop
        progress(asked.recipe, seen, len(dataset), 0.0)
    chosen = {score.metric: score.value / 100 for score in metric.compute()}.get("presence threshold")
    if chosen is None:
        raise UserError(
            f"{asked.recipe}: {len(metric.phrases)} phrases, but not both phrases with a target and phrases without; "
            "choose a data set with absent things, such as grefcoco/val or shapes/refer_val, and report another split"
        )
    absent = [score < chosen for _, score, there in metric.phrases if not there]
    present = [score >= chosen for _, score, there in metric.phrases if there]
    return Calibration(
        reject=round(chosen, 4),
        recipe=asked.recipe,
        split=recipe.split,
        phrases=len(metric.phrases),
        n_acc=round(100 * sum(absent) / len(absent), 2),
        t_acc=round(100 * sum(present) / len(present), 2),
    )


def write(predictor: Predictor, folder: Path, found: Calibration) -> None:
    """Keep a threshold in a model's folder; its other files are not touched.

    Raises UserError for a folder that holds no model.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: no {FILE} here; give the `final` folder of a stage")
    predictor.processor.calibration = found
    partial = folder / f"{FILE}.partial"
    partial.write_text(predictor.processor.fields(), encoding="utf8")
    os.replace(partial, folder / FILE)
