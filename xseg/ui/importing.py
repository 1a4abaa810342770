"""``xseg import`` on the terminal."""

from rich.console import Console

from xseg.infer.importing import Import, import_xsam


def import_checkpoint(asked: Import, console: Console) -> None:
    """Convert and print the report; UserError for a source that does not fit."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    with console.status(f"reading {asked.source}"):
        report = import_xsam(asked)
    console.print(str(report), markup=False, soft_wrap=True)
    console.print(f"{asked.out}: ready for xseg.load, xseg chat and xseg eval", markup=False, soft_wrap=True)
