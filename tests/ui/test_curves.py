"""What the curves say is what metrics.jsonl and results.json hold, and every name can be read."""

import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xseg.ui.curves import held_out_plot, read_run, training_plots
from xseg.ui.plot import ROW, Line, Plot, draw, spread, ticks
from xseg.ui.report import write_report

A, B = "shapes/a_val", "shapes/b<val"
finite = st.floats(-1e6, 1e6, allow_nan=False)


def stage(folder: Path, seconds: float, held_out: dict[str, float], sources: tuple[str, ...] = ("a", "b")) -> Path:
    """A stage of forty steps and two looks at ``held_out``."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, 41):
        clock = {"step": step, "elapsed_s": seconds * step / 40}
        lines.append(clock | {"loss": 3 / step, "lm": 1 / step, "lr": 1e-3, "source": sources[step % len(sources)]})
        if held_out and step in (20, 40):
            figures = {name: {"metric": "PQ", "value": value + step, "n": 9} for name, value in held_out.items()}
            lines.append(clock | {"held_out": figures})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "lo', encoding="utf8")
    return folder / "metrics.jsonl"


def score(data_set: str, value: float, blind: float, metric: str = "PQ") -> list[dict[str, Any]]:
    row = {"task": "t", "dataset": data_set, "metric": metric, "n": 200, "ci95": [value - 1, value + 1]}
    return [
        row | {"value": value, "protocol": "as published"},
        row | {"value": blind, "protocol": "blind: a guess", "ci95": None},
    ]


def three(run: Path) -> Any:
    files = [stage(run / "s10", 60, {A: 10, B: 0}), stage(run / "s1", 120, {A: 5}), stage(run / "s2", 30, {}, ("b",))]
    results = [(run / "s1/eval", {"rows": score(A, 47, 3)}), (run / "s10/eval", {"rows": score(A, 52, 3)})]
    results.append((run / "s10/eval_more", {"rows": score("c_val", 20, 4, "cIoU") + score("c_val", 9, 9, "gIoU")}))
    return read_run(run, files, results)


def test_minutes_go_on_over_the_stages_in_natural_order(tmp_path: Path) -> None:
    stages = three(tmp_path)
    assert [(s.name, s.start, s.end) for s in stages] == [("s1", 0, 2), ("s2", 2, 2.5), ("s10", 2.5, 3.5)]
    plot = held_out_plot(stages)
    assert plot is not None and list(plot.stages) == [("s1", 0, 2), ("s2", 2, 2.5), ("s10", 2.5, 3.5)]
    first = plot.lines[0]
    assert list(first.pieces) == [[(1, 25), (2, 45)], [(3, 30), (3.5, 50)]]
    assert list(first.ends) == [(2, 47, (46, 48)), (3.5, 52, (51, 53))] and first.level == 3


def test_lines_are_named_by_their_final_figure(tmp_path: Path) -> None:
    plot = held_out_plot(three(tmp_path))
    assert plot is not None
    assert [line.name for line in plot.lines] == ["a_val, PQ 52.0", "b<val, PQ 40.0", "c_val, cIoU 20.0"]
    assert [line.level_name for line in plot.lines if line.level is not None] == ["blind a_val 3.0", "blind c_val 4.0"]
    assert len({line.colour for line in plot.lines}) == 3


def test_losses_are_drawn_per_data_set_and_rates_are_not(tmp_path: Path) -> None:
    plots = {plot.title: plot for plot in training_plots(three(tmp_path))}
    assert list(plots) == ["loss", "lm loss", "learning rate"]
    b, a = plots["lm loss"].lines
    assert len(a.pieces) == 2 and len(b.pieces) == 3 and a.colour != b.colour
    assert sum(map(len, a.raw)) == 40 and sum(map(len, b.raw)) == 80
    assert {y for piece in plots["learning rate"].lines[0].pieces for _, y in piece} == {1e-3}


def test_without_looks_and_evaluations_there_is_no_picture(tmp_path: Path) -> None:
    stages = read_run(tmp_path, [stage(tmp_path / "s1", 60, {})], [])
    assert held_out_plot(stages) is None and training_plots(stages)


def test_the_picture_stands_alone_beside_the_page(tmp_path: Path) -> None:
    stage(tmp_path / "s1", 60, {A: 10, B: 20})
    page = write_report(tmp_path)
    root = ET.parse(page.parent / "curves.svg").getroot()
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Scores over training time", "training minutes", "score, 0 to 100", "b<val, PQ 60.0", "s1"} <= set(words)
    assert root.find("{http://www.w3.org/2000/svg}rect").get("fill") == "#fff"  # type: ignore[union-attr]
    assert "b&lt;val" in page.read_text(encoding="utf8") and "b<val" not in page.read_text(encoding="utf8")


@given(st.lists(finite, min_size=1, max_size=9), st.floats(0.1, 30))
def test_names_keep_their_distance_order_and_room(wanted: list[float], gap: float) -> None:
    low, high = 0.0, 300.0
    moved = spread(wanted, gap, low, high)
    assert all(low - 1e-6 <= y <= high + 1e-6 for y in moved)
    ordered = [moved[k] for k in sorted(range(len(wanted)), key=lambda k: wanted[k])]
    assert all(b - a >= gap - 1e-6 for a, b in pairwise(ordered))


@example(0.0, 5e-324)
@given(finite, finite)
def test_ticks_are_few_and_span_the_values(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-3)
    assert found[0] <= low + slack and found[-1] >= high - slack and 2 <= len(found) <= 8


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0, 0.0], [1e9, -1e9], [float(i) for i in range(5000)]])
def test_a_plot_stays_in_its_frame(values: list[float]) -> None:
    lines = [Line(f"line {k}", "#0072b2", [list(enumerate(values))], level=values[0], level_name="b") for k in range(4)]
    svg = draw(Plot("a<b", "y", "x", [("s1", 0, 1), ("s2", 1, len(values) - 1)], lines))
    root = ET.fromstring(svg)
    points = [float(v) for row in re.findall(r'points="([^"]*)"', svg) for pair in row.split() for v in pair.split(",")]
    assert "nan" not in svg and points and min(points) >= 0 and max(points) <= 560
    names = [node for node in root.iter("text") if re.fullmatch(r"line \d|b", node.text or "")]
    heights = sorted(float(node.attrib["y"]) for node in names)
    assert len(heights) == 8 and all(b - a >= ROW - 0.2 for a, b in pairwise(heights))
