"""``xseg calibrate`` on the terminal."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from xseg.infer.calibrate import Asked, calibrate, write
from xseg.ui.loading import open_model


def calibrate_model(model: Path, asked: Asked, console: Console) -> None:
    """Choose the threshold with a progress bar, write it and say what it does; UserError when none can be chosen."""
    predictor = open_model(model, console)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(asked.recipe, total=None)
        found = calibrate(predictor, asked, lambda _, done, total, __: bar.update(task, completed=done, total=total))
    write(predictor, model, found)
    console.print(
        f"below {found.reject} a phrase is not there: right for {found.n_acc} % of what is absent (N-acc) and "
        f"{found.t_acc} % of what is there (T-acc), {found.phrases} phrases of {found.recipe} ({found.split}); "
        f"written to {model}",
        markup=False,
        soft_wrap=True,
    )
