"""Trackers beside metrics.jsonl (tensorboard, wandb, trackio), each an extra, through accelerate."""

import importlib.util
from collections.abc import Sequence

from accelerate import Accelerator

from xseg.errors import UserError
from xseg.train.stage import Stage


def check(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that is not installed; accelerate would leave it out in silence."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name}: not installed: pip install xseg[{name}], or drop it from track")


def start(acc: Accelerator, stage: Stage) -> None:
    """Open the stage's trackers on rank 0; the run is called as its stage and its folder."""
    if stage.recipe.track:
        named = {"wandb": {"name": f"{stage.recipe.stage} {stage.out.name}", "dir": str(stage.out)}}
        stage.out.mkdir(parents=True, exist_ok=True)
        acc.init_trackers("xseg", init_kwargs=named)
