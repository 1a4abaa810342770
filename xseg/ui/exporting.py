"""``xseg export`` on the terminal."""

from pathlib import Path

from rich.console import Console

from xseg.infer.export import MEGABYTE, Export, export
from xseg.infer.language import export_language


def export_language_part(source: Path, out: Path, dtype: str, console: Console) -> None:
    """Export the language part alone and say how it compares; UserError when it may not be written."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status(f"casting the language part of {source} to {dtype} and comparing logits"):
        off = export_language(Export(source, out, dtype))
    console.print(f"logits off by {off:.1e} of the largest", markup=False)
    console.print(f"{out}: opens with AutoModelForCausalLM and AutoTokenizer", markup=False, soft_wrap=True)


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
