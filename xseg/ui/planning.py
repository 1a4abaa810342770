"""``xseg plan`` on the terminal."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from xseg.errors import UserError
from xseg.train.plan import Asked, Need, Prediction, Setting, predict
from xseg.train.stage import read_stage

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
GIGABYTE, TERA = 1e9, 1e12


def parse_memory(given: str) -> float:
    """``80GB`` or ``24 GiB`` -> bytes. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]i?B)\s*", given, re.IGNORECASE)
    if found is None or found[1].count(".") > 1 or not float(found[1]):
        raise UserError(f"--memory {given}: write a number and a unit, for example 80GB or 24GiB")
    return float(found[1]) * UNITS[found[2].upper()]


def show_plan(name: str, overrides: Sequence[str], asked: Asked, console: Console) -> None:
    """Predict and print; UserError for what is wrong in the recipes."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    # Earlier stages give weights and no sizes: they need not be there.
    stage = read_stage(name, [*overrides, "init_from=[]"])
    with console.status(f"walking {stage.recipe.stage} without values"):
        found = predict(stage, asked)
    console.print(
        f"{stage.recipe.stage}: {found.parameters:,} parameters, {found.trained:,} of them learn; walked with "
        f"{found.basis}",
        markup=False,
        soft_wrap=True,
    )
    console.print(_table(found, asked))
    for line in _time(found, asked):
        console.print(line, markup=False, soft_wrap=True)
    limit = asked.memory / GIGABYTE
    if found.chosen is None and (asked.gpus or found.need.total > asked.memory):
        raise UserError(
            f"{name}: nothing fits into {limit:.0f} GB, not even one sample at a time: more --gpus (ZeRO-3 spreads the "
            "weights), adapters, fewer trainable parts, or a smaller model recipe"
        )


def _table(found: Prediction, asked: Asked) -> Table:
    where = f"{asked.gpus} x {asked.memory / GIGABYTE:.0f} GB" if asked.gpus else "this CPU, one process"
    columns = [("as the recipe says", found.given, found.need)]
    if found.chosen is not None and found.chosen_need is not None:
        columns.append(("chosen", found.chosen, found.chosen_need))
    table = Table("bytes of a rank", *(title for title, _, _ in columns), title=where, title_justify="left")
    rows = [_rows(setting, need, bool(asked.gpus)) for _, setting, need in columns]
    for lines in zip(*rows, strict=True):
        table.add_row(lines[0][0], *(value for _, value in lines))
    return table


def _rows(setting: Setting, need: Need, on_gpus: bool) -> list[tuple[str, str]]:
    def size(value: float) -> str:
        return f"{value / GIGABYTE:.2f} GB"

    program = [] if on_gpus else [("libraries", size(need.program))]
    return [
        ("ZeRO stage", str(setting.zero) if on_gpus else "none"),
        ("samples a micro-batch", str(setting.batch_size)),
        ("micro-batches a step", str(setting.accumulate)),
        ("activation checkpointing", "yes" if setting.checkpointing else "no"),
        ("weights", size(need.weights)),
        ("gradients", size(need.gradients)),
        ("optimizer", size(need.optimizer)),
        ("activations", size(need.activations)),
        *program,
        ("together", size(need.total)),
    ]


def _time(found: Prediction, asked: Asked) -> list[str]:
    lines = [f"a sample takes {found.flops / TERA:.3g} TFLOP, forward and backward"]
    if not asked.gpus:
        return lines
    speed = f"at {asked.flops / TERA:.0f} TFLOP/s sustained by each"
    if found.samples is None or found.hours is None:
        million = found.flops * 1e6 / (asked.gpus * asked.flops) / 3600
        lines.append(f"a million samples: {million:.1f} hours {speed} (a data set here has no count)")
    else:
        lines.append(f"{found.samples:,} samples: {found.hours:.1f} hours {speed}")
    return lines
