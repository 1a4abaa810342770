"""``xseg eval``: run a suite with a progress bar and print the table."""

import dataclasses
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from xseg.config import Suite, load_recipe
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.infer.ranks import joined
from xseg.infer.summary import is_blind
from xseg.ui.loading import open_model

SILENT = Console(quiet=True)


def run_suite(model: Path, suite: str, out: Path, root: Path, batch_size: int, console: Console) -> None:
    """Evaluate and print; UserError for anything wrong with the model, the suite or the data.

    Under torchrun or ``accelerate launch`` every process scores its part, and the first one prints.
    """
    recipe = load_recipe(Suite, suite)
    with joined() as ranks:
        run = Evaluation(root, out, batch_size, str(model), ranks=ranks)
        _run(recipe, model, run, console if ranks.first else SILENT)


def _run(recipe: Suite, model: Path, run: Evaluation, console: Console) -> None:
    predictor = open_model(model, console, run.ranks.device)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def tell(dataset: str, done: int, total: int, seconds: float) -> None:
            if dataset not in bars:
                bars[dataset] = progress.add_task(dataset, total=total, rate="")
            progress.update(bars[dataset], completed=done, rate=f"{done / max(seconds, 1e-9):.1f} samples/s")

        def note(text: str) -> None:
            console.print(f"note: {text}", markup=False)

        results = evaluate(predictor, recipe, dataclasses.replace(run, progress=tell, note=note))
    console.print(table(results))
    console.print(summary_table(results))
    for row in results["speed"]:
        rate_text = f"{row['samples'] / max(row['seconds'], 1e-9):.1f} samples/s"
        console.print(
            f"{row['dataset']}: {row['samples']} samples in {row['seconds']:.1f} s, {rate_text}", markup=False
        )
    console.print(f"{run.out / 'results.json'}", markup=False, soft_wrap=True)


def summary_table(results: dict[str, Any]) -> Table:
    """One line per data set: its headline, the blind guess, how much of the way to the maximum is gone, and the mean
    IoU of the best masks with what choosing among them loses."""
    out = Table(
        title="closed: how much of the way from the blind guess to the maximum is gone",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    out.add_column("data set", no_wrap=True)
    out.add_column("metric", overflow="fold")
    for name in ("value", "95 %", "blind", "closed", "oracle", "gap", "n"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in results["summary"]:
        out.add_row(
            row["dataset"].rsplit("/", 1)[-1],
            row["metric"],
            f"{row['value']:.1f}",
            "-".join(f"{v:.1f}" for v in row["ci95"]) if row["ci95"] else "",
            "" if row["blind"] is None else f"{row['blind']:.1f}",
            "" if row["closed"] is None else f"{row['closed']:.0f} %",
            *(f"{row[name]:.1f}" if name in row else "" for name in ("oracle IoU", "selection gap")),
            str(row["n"]),
        )
    return out


def table(results: dict[str, Any]) -> Table:
    """Results with the blind baseline and the published value of the same metric beside them."""
    published = any("published" in row for row in results["rows"])
    out = Table(title=f"suite {results['suite']}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("data set", "metric", "value", "95 %", "blind", *(["published"] if published else []), "n"):
        if name in ("data set", "metric"):
            out.add_column(name, overflow="fold")
        else:
            out.add_column(name, justify="right", no_wrap=True, min_width=9 if name == "95 %" else 4)
    blind = {(r["row"], r["metric"]): r["value"] for r in results["rows"] if is_blind(r)}
    last = None
    for row in results["rows"]:
        if is_blind(row):
            continue
        base = blind.get((row["row"], row["metric"]))
        if last not in (None, row["dataset"]):
            out.add_section()
        out.add_row(
            "" if row["dataset"] == last else row["dataset"],
            row["metric"],
            f"{row['value']:.1f}",
            "-".join(f"{v:.1f}" for v in row["ci95"]) if row["ci95"] else "",
            "" if base is None else f"{base:.1f}",
            *([f"{row['published']:.1f}" if "published" in row else ""] if published else []),
            str(row["n"]),
        )
        last = row["dataset"]
    return out
