"""``xseg data convert``, ``build-vgd``, ``build-interactive`` and ``lint``: the library's work, told in a terminal."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from xseg.config import DataRecipe, Mixture, decode, load_recipe, read_yaml
from xseg.data.build import Layout, build
from xseg.data.convert import JSONL, RECIPE, convert
from xseg.data.lint import lint
from xseg.paths import find


def run_convert(layout: str, source: Path, out: Path, images: Path | None, console: Console) -> None:
    """Convert, and say how to go on."""
    count = convert(layout, source, out, images)
    console.print(Text(f"{count} samples in {out / JSONL}; look at them: xseg data show {out / RECIPE} --root {out}"))


def run_build(layout: Layout, instances: Path, out: Path, seed: int, workers: int, console: Console) -> None:
    """Build with a progress bar."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"prompts for {instances.name}", total=None)
        objects = build(
            layout,
            instances,
            out,
            seed=seed,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(Text(f"{objects} objects with prompts in {out} (seed {seed})"))


def run_lint(names: Sequence[str], root: Path, workers: int, console: Console) -> bool:
    """Print every fault of the recipes (mixtures stand for theirs); return whether there was none."""
    recipes: dict[str, DataRecipe] = {}
    for name in names:
        path = find(name, "data_recipes")
        data = read_yaml(path)
        if "datasets" in data:
            listed = [entry.recipe for entry in decode(Mixture, data, str(path)).datasets]
            recipes.update({entry: load_recipe(DataRecipe, entry, beside=path.parent) for entry in listed})
        else:
            recipes[name] = decode(DataRecipe, data, str(path))
    reports, leaks = lint(recipes, root, workers)
    for report in reports:
        counts = Counter(fault.kind for fault in report.faults)
        told = ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) or "no fault"
        console.print(Text(f"{report.recipe} ({report.split}): {report.samples} samples, {told}"), soft_wrap=True)
        for fault in report.faults:
            console.print(Text(f"  {fault.kind}: {fault.text}"), soft_wrap=True)
        if report.sums:
            console.print(
                Text(f"  no checksum stated; of these files: sha256: {json.dumps(report.sums)}"), soft_wrap=True
            )
    for leak in leaks:
        console.print(Text(f"{leak.kind}: {leak.text}"), soft_wrap=True)
    return not leaks and not any(report.faults for report in reports)
