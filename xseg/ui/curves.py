"""metrics.jsonl -> small line charts as inline SVG, one per quantity."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 270, 150, 44, 22, 24, 8
FIRST = ("loss", "lm", "class", "mask", "dice", "pixel_class", "lr")
"""Shown in this order; then the rest by name."""
HIDDEN = ("step", "data_s", "elapsed_s")

Series = dict[str, list[tuple[int, float]]]


def read_series(path: Path) -> Series:
    """Return {quantity: [(step, value), …]} of a metrics.jsonl; a half-written last line is skipped."""
    found: Series = {}
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "source" in row:  # a step is of one data set: their losses are curves of their own
            row[f"loss of {row['source']}"] = row["loss"]
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and name not in HIDDEN:
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    if len(of_source := [name for name in found if name.startswith("loss of ")]) == 1:
        del found[of_source[0]]
    order = {name: k for k, name in enumerate(FIRST)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def chart(name: str, points: Sequence[tuple[int, float]]) -> str:
    """One SVG: the values thin, their running mean (over a twentieth of the run) thick."""
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = _range(values)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (min(max(value, low), high) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def path(row: Sequence[float]) -> str:
        stride = max(1, len(row) // 400)
        return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in list(zip(steps, row, strict=True))[::stride])

    ticks = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="tick" x="{LEFT - 5}" y="{y(v) + 3:.1f}" text-anchor="end">{v:.2g}</text>'
        for v in (low, (low + high) / 2, high)
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)} over steps">'
        f'<text class="name" x="{LEFT}" y="14">{html.escape(name)}</text>'
        f'<text class="last" x="{WIDTH - RIGHT}" y="14" text-anchor="end">{_mean(values)[-1]:.4g}</text>{ticks}'
        f'<text class="tick" x="{LEFT}" y="{HEIGHT - 6}">{first}</text>'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step {last}</text>'
        f'<polyline class="raw" fill="none" stroke="#0072b2" points="{path(values)}"/>'
        f'<polyline class="mean" fill="none" stroke="#0072b2" points="{path(_mean(values))}"/></svg>'
    )


def _mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean without a bias at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The axis: from the least value to the 99th percentile, so that one spike does not flatten the curve."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return (low, high) if high > low else (low - 0.5 * abs(low) - 1e-9, high + 0.5 * abs(high) + 1e-9)
