"""``xseg data shapes``: write ShapeWorld with a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from xseg.data.shapeworld.tasks import write_all
from xseg.data.shapeworld.world import Variant
from xseg.data.shapeworld.write import write_splits


def write_shapes(
    out: Path, images: int, val_images: int, seed: int, workers: int, *, size: int, hard: bool, console: Console
) -> None:
    """Write the splits; UserError when ``out`` holds something else."""
    variant: Variant = "hard" if hard else "easy"
    with _bars(console) as tell:
        write_splits(out, images, val_images, seed, size=size, variant=variant, workers=workers, progress=tell)
    console.print(f"ShapeWorld in {out}: use --root {out.parent} (data_root in a stage)", markup=False, soft_wrap=True)


def write_tasks(out: Path, images: int, workers: int, console: Console) -> None:
    """Add the other tasks to a ShapeWorld, for its first ``images`` training images."""
    with _bars(console) as tell:
        write_all(out, images, workers=workers, progress=tell)


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for everything that the yielded function is told of."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        yield tell
