"""``xseg export`` on the terminal."""

from pathlib import Path

from rich.console import Console

from xseg.infer.export import MEGABYTE, Export, export


def export_model(source: Path, out: Path, dtype: str, limit_mb: float | None, console: Console) -> None:
    """Export and say how the copy compares; UserError when it may not be written."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status(f"casting {source} to {dtype} and comparing answers"):
        found = export(Export(source, out, dtype, limit_mb))
    size = sum(p.stat().st_size for p in out.iterdir() if p.is_file()) / MEGABYTE
    if found.masks:
        console.print(f"masks  mean IoU {found.iou:.4f} with the source's, {found.masks} masks", markup=False)
    if found.texts:
        console.print(f"texts  {found.same} of {found.texts} answers equal", markup=False)
    console.print(f"{out}: {size:.1f} MB, card in {out / 'README.md'}", markup=False, soft_wrap=True)
