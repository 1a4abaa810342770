"""``xseg names`` on the terminal."""

from pathlib import Path

from rich.console import Console

from xseg.infer import naming
from xseg.infer.processing import XSegProcessor


def add_names(folder: Path, siglip: Path, template: str, console: Console) -> None:
    """Put SigLIP's texts beside a model and say what they do; UserError as ``naming.add``."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status(f"reading {siglip}"):
        place = naming.add(folder, siglip, template)
    listed = XSegProcessor.from_pretrained(folder).categories
    known = "what its training data list is not known" if listed is None else f"its training data list {len(listed)}"
    console.print(
        f"{place}: SigLIP now names objects too where a list of names is asked for, in open-vocabulary rows of suites "
        f"and `segment: …` of the chat ({known}); without this folder the model is what it was",
        markup=False,
        soft_wrap=True,
    )
