"""Opening a model on the terminal: a spinner instead of the libraries' own bars and remarks."""

from pathlib import Path

from rich.console import Console

from xseg.infer.predictor import Predictor, load


def open_model(folder: Path, console: Console, device: str | None = None) -> Predictor:
    """Load a stage's ``final`` folder, by default where ``load`` puts it; UserError when it is none."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status(f"loading {folder}"):
        predictor, _ = load(folder, device)
    return predictor
