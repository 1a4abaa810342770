"""metrics.jsonl and results.json of a run's stages -> curves over training minutes."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xseg.infer.summary import is_blind
from xseg.ui.plot import COLOURS, Line, Plot, number

FIRST = ("loss", "lm", "class", "mask", "dice", "pixel_class", "aux")
"""Shown in this order; then the rest by name."""
HIDDEN = ("step", "data_s", "elapsed_s")
WHOLE = ("lr", "grad_norm", "images_per_s", "tokens_per_s", "data_share", "tflops", "mfu", "memory_gb")
"""What belongs to the run and is not drawn per data set."""
UNITS = {
    "lr": "learning rate", "grad_norm": "gradient norm", "images_per_s": "images per second",
    "tokens_per_s": "text tokens per second", "data_share": "share of time spent waiting for data",
    "tflops": "TFLOP/s of a process", "mfu": "share of the accelerator's peak", "memory_gb": "peak memory, GB",
}  # fmt: skip
MINUTES = "training minutes"
INK = "#667085"
WIDE = (1000, 430)
"""Width and height of the held-out picture."""

Series = dict[tuple[str, str], list[tuple[float, float]]]
"""(quantity, data set or "") -> [(minutes, value), …]."""


@dataclass(frozen=True)
class Look:
    """One held-out figure."""

    minutes: float
    value: float
    n: int


@dataclass
class Trained:
    """What one stage left, its minutes counted from the start of the run's first stage."""

    name: str
    start: float
    end: float
    series: Series = field(default_factory=dict)
    looks: dict[tuple[str, str], list[Look]] = field(default_factory=dict)
    """(data set, metric) -> figures on held-out images while the stage trained."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the evaluations of the finished stage."""


def read_run(run: Path, files: Iterable[Path], results: Sequence[tuple[Path, dict[str, Any]]]) -> list[Trained]:
    """Read the stages whose metrics.jsonl are given, in natural order: s2 before s10.

    ``results`` are (folder, results.json); each belongs to the stage in whose folder it lies.
    """
    out: list[Trained] = []
    start = 0.0
    for path in sorted(files, key=lambda p: natural(p.relative_to(run).as_posix())):
        name = path.parent.relative_to(run).as_posix()
        stage = read_stage(path, run.resolve().name if name == "." else name, start)
        stage.scores = [row for place, found in results if path.parent in place.parents for row in found["rows"]]
        out.append(stage)
        start = stage.end
    return out


def read_stage(path: Path, name: str, start: float) -> Trained:
    """Read one metrics.jsonl; a half-written last line and lines without a time are skipped."""
    stage = Trained(name, start, start)
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "elapsed_s" not in row:
            continue
        minutes = start + row["elapsed_s"] / 60
        stage.end = max(stage.end, minutes)
        for data_set, found in row.get("held_out", {}).items():
            look = Look(minutes, found["value"], found["n"])
            stage.looks.setdefault((data_set, found["metric"]), []).append(look)
        for key, value in row.items():
            if key not in HIDDEN and isinstance(value, int | float) and math.isfinite(value):
                source = "" if key in WHOLE else row.get("source", "")
                stage.series.setdefault((key, source), []).append((minutes, float(value)))
    return stage


def held_out_plot(stages: Sequence[Trained]) -> Plot | None:
    """The held-out figures over training minutes, or None when nothing was looked at or evaluated."""
    keys = list(dict.fromkeys([key for stage in stages for key in stage.looks] + _scored(stages)))
    if not keys:
        return None
    short = short_names([data_set for data_set, _ in keys])
    blind = {(r["dataset"], r["metric"]): r["value"] for s in stages for r in s.scores if is_blind(r)}
    lines = []
    for place, (data_set, metric) in enumerate(keys):
        pieces = [[(look.minutes, look.value) for look in s.looks.get((data_set, metric), [])] for s in stages]
        colour, level = COLOURS[place % len(COLOURS)], blind.get((data_set, metric))
        ends = [end for stage in stages for end in _ends(stage, data_set, metric)]
        line = Line(short[data_set], colour, [p for p in pieces if p], dots=True, ends=ends, level=level)
        value = line.last[1] if line.last else math.nan
        name, below = f"{short[data_set]}, {metric} {value:.1f}", f"blind {short[data_set]} {level or 0:.1f}"
        lines.append(Line(name, colour, line.pieces, (), True, ends, level, below))
    marks = {
        "dots: the first images of each set, while training": any(line.pieces for line in lines),
        "rings: evaluation, with 95 % interval": any(line.ends for line in lines),
        "dashed: blind baseline": bool(blind),
    }
    note = "; ".join(text for text, shown in marks.items() if shown)
    top = max(y for line in lines for _, y in [*(p for piece in line.pieces for p in piece), *_heights(line)])
    bands = [(s.name, s.start, s.end) for s in stages]
    y_range = (0.0, 100.0 if top > 50 else max(top, 1.0))
    return Plot("Scores over training time", "score, 0 to 100", MINUTES, bands, lines, note, y_range, *WIDE)


def training_plots(stages: Sequence[Trained]) -> list[Plot]:
    """One chart per quantity: per data set where a step's batch comes from one, all stages in a row."""
    quantities = list(dict.fromkeys(key for stage in stages for key, _ in stage.series))
    order = {name: place for place, name in enumerate((*FIRST, *sorted(set(quantities) - {*FIRST, *WHOLE}), *WHOLE))}
    sources = list(dict.fromkeys(source for stage in stages for _, source in stage.series if source))
    short, bands = short_names(sources), [(s.name, s.start, s.end) for s in stages]
    colours = {source: COLOURS[place % len(COLOURS)] for place, source in enumerate(sources)}
    out = []
    for quantity in sorted(quantities, key=lambda name: order[name]):
        lines = []
        for source in [*sources, ""]:
            raw = [s.series[quantity, source] for s in stages if (quantity, source) in s.series]
            if sum(map(len, raw)) > 1:
                smooth = raw if quantity == "lr" else [_smooth(piece) for piece in raw]
                last = number(smooth[-1][-1][1])
                name = f"{short[source]} {last}" if source else last
                lines.append(Line(name, colours.get(source, INK), smooth, raw))
        if lines:
            title = UNITS.get(quantity, quantity if quantity == "loss" else f"{quantity} loss")
            unit = UNITS.get(quantity, "weighted loss")
            note = "" if quantity in WHOLE else "per data set; thick: running mean"
            out.append(Plot(title, unit, MINUTES, bands, lines, note, _range(lines)))
    return out


def mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean over a twentieth of the values, without a bias at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def short_names(names: Sequence[str]) -> Mapping[str, str]:
    """``shapes/talk_val`` -> ``talk_val``, unless two data sets would then be called alike."""
    tails = [name.rsplit("/", 1)[-1].removesuffix(".yaml") for name in dict.fromkeys(names)]
    return {n: t if tails.count(t) == 1 else n for n, t in zip(dict.fromkeys(names), tails, strict=True)}


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key in which numbers count as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)]


def _scored(stages: Sequence[Trained]) -> list[tuple[str, str]]:
    """(data set, its first metric) of everything evaluated that no stage looked at."""
    looked = {data_set for stage in stages for data_set, _ in stage.looks}
    first: dict[str, str] = {}
    for row in (row for stage in stages for row in stage.scores):
        if row["dataset"] not in looked and not is_blind(row):
            first.setdefault(row["dataset"], row["metric"])
    return list(first.items())


def _ends(stage: Trained, data_set: str, metric: str) -> list[tuple[float, float, tuple[float, float] | None]]:
    rows = [r for r in stage.scores if (r["dataset"], r["metric"]) == (data_set, metric) and not is_blind(r)]
    return [(stage.end, row["value"], tuple(row["ci95"]) if row["ci95"] else None) for row in rows[:1]]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for (x, _), y in zip(points, mean([y for _, y in points]), strict=True)]


def _heights(line: Line) -> list[tuple[float, float]]:
    return [(0.0, line.level or 0.0), *((x, y) for x, y, _ in line.ends)]


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    """From the least running mean to the 98th percentile of all, so that one spike does not flatten the curves."""
    ordered = sorted(y for line in lines for piece in line.pieces for _, y in piece)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    return (min(low, 0.0) if low < high / 2 else low, high)
