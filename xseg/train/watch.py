"""Held-out figures while a stage trains: what ``xseg eval`` does, on a few images, without a trace in the training."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xseg.config import Suite
from xseg.data.dataset import Dataset
from xseg.errors import UserError
from xseg.infer.evaluate import Evaluation, evaluate, open_row
from xseg.infer.predictor import Predictor
from xseg.infer.processing import XSegProcessor
from xseg.train.stage import Stage


@dataclass(frozen=True)
class HeldOut:
    """What a stage looks at, and when."""

    suite: Suite
    """The rows that the stage's model can do, each limited to the watched images."""
    every: int
    processor: XSegProcessor
    data_root: str
    batch_size: int

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after ``step`` (1-based) of ``steps`` are looked at."""
        return step == steps or step % self.every == 0

    def figures(self, model: Any) -> dict[str, dict[str, Any]]:
        """Score a bare model: {row: {"metric", "value", "n"}}, the first metric of each row's task.

        The model comes back in the mode it was in, and the random generators as they were.
        """
        devices = [p.device for p in [next(model.parameters())] if p.device.type == "cuda"]
        training = model.training
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices):
            try:
                run = Evaluation(self.data_root, Path(folder) / "look", self.batch_size, blind=False)
                rows = evaluate(Predictor(model.eval(), self.processor), self.suite, run)["rows"]
            finally:
                model.train(training)
        first = {row["dataset"]: row for row in reversed(rows)}
        return {r.recipe: {k: first[r.recipe][k] for k in ("metric", "value", "n")} for r in self.suite.rows}


def held_out(stage: Stage, skeleton: Any, processor: XSegProcessor, split_by: str) -> HeldOut | None:
    """Return what ``watch`` asks for, or None; ``skeleton`` is the stage's model, its weights are not looked at.

    ``split_by``: what leaves no rank with whole weights, or "". Raises UserError where something does, for data that
    are not there, and when the model can do no row of the suite.
    """
    watch = stage.recipe.watch
    if watch is None or stage.watched is None:
        return None
    if split_by:
        raise UserError(
            f"watch: under {split_by} no rank has whole weights to look at between two steps; launch with "
            "train_stages/accelerate/zero2.yaml, or leave it out with --set watch=null"
        )
    rows = []
    for row in stage.watched.rows:
        dataset = open_row(Predictor(skeleton, processor), row, stage.recipe.data_root)
        if dataset is not None:
            rows.append(row.model_copy(update={"limit": first_samples(dataset, watch.images)}))
    if not rows:
        raise UserError(
            f"watch: suite {watch.suite}: no row fits what a stage of parts {stage.recipe.parts} can do (stage 1 has "
            "no text, stage 2 no masks); name another suite, or leave it out with --set watch=null"
        )
    suite = stage.watched.model_copy(update={"rows": rows})
    return HeldOut(suite, watch.every, processor, stage.recipe.data_root, stage.recipe.batch_size)


def first_samples(dataset: Dataset, images: int) -> int:
    """How many samples stand before the first one of the image after the first ``images``."""
    seen: set[Any] = set()
    for index in range(len(dataset)):
        seen.add(dataset.sample(index).image_id)
        if len(seen) > images:
            return index
    return len(dataset)
