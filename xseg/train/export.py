"""The folder a finished stage leaves: weights, processor, the decoded recipe and what was loaded at its start."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from xseg.infer.processing import XSegProcessor
from xseg.models import adapters, checkpoint
from xseg.models.checkpoint import LoadReport
from xseg.train import assemble, state
from xseg.train.stage import Stage

STAGE, REPORT = "stage.yaml", "load_report.json"


def export(acc: Accelerator, model: Any, stage: Stage, processor: XSegProcessor, reports: Sequence[LoadReport]) -> None:
    """Write ``out/final``, which ``xseg.load`` opens; all ranks call it, because ZeRO-3 gathers the weights.

    Raises UserError when the disk is full; a ``final`` of an earlier export stays until this one is complete.
    """
    weights = acc.get_state_dict(model)
    with state.writing(stage.out / "final", acc) as folder:
        if acc.is_main_process:
            _save(acc.unwrap_model(model), weights, stage, reports, folder)
            processor.save_pretrained(folder)
            (folder / STAGE).write_text(assemble.describe(stage), encoding="utf8")
            (folder / REPORT).write_text(json.dumps([asdict(r) for r in reports], indent=1), encoding="utf8")


def _save(model: Any, weights: Mapping[str, Tensor], stage: Stage, reports: Sequence[LoadReport], folder: Path) -> None:
    """The whole model, or, with adapters, what training changed and how the rest is built."""
    recipe = stage.recipe
    if recipe.adapters:
        model.config.save_pretrained(folder)
        base = adapters.Base(stage.model.model_dump(mode="json"), recipe.init_from, recipe.seed)
        adapters.save(weights, adapters.kept(model, reports), recipe.adapters, base, folder)
        return
    whole = assemble.skeleton(model.config)
    whole.load_state_dict(weights, assign=True)
    checkpoint.save(whole, folder)
