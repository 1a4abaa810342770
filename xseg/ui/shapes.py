"""``xseg data shapes``: write ShapeWorld with a progress bar."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from xseg.data.shapeworld.write import write_splits


def write_shapes(
    out: Path, images: int, val_images: int, seed: int, *, size: int, hard: bool, console: Console
) -> None:
    """Write the splits; UserError when ``out`` holds something else."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def tell(split: str, done: int, total: int) -> None:
            if split not in bars:
                bars[split] = progress.add_task(split, total=total)
            progress.update(bars[split], completed=done)

        write_splits(out, images, val_images, seed, size=size, variant="hard" if hard else "easy", progress=tell)
    console.print(f"ShapeWorld in {out}: use --root {out.parent} (data_root in a stage)", markup=False, soft_wrap=True)
