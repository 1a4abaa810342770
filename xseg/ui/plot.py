"""A line chart over time as SVG: axes with units, stages as bands, every line named where it ends."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which differ for the colour-blind too; words stand beside them in the ink of the text."""
STYLE = (
    ".plot{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
    ".plot text{fill:#1d2330;font-size:12px}.plot .title{font-size:15px;font-weight:600}"
    ".plot .soft{fill:#667085}.plot .grid{stroke:#e4e7ec}.plot .axis{stroke:#98a2b3}"
    ".plot .ring{fill:#fff}.plot .band{fill:#f4f5f8}.plot .border{stroke:#98a2b3;stroke-dasharray:1 3}"
)
"""Of a picture on its own; in a page, report.css says the same for light and dark."""
TOP, BOTTOM, LEFT = 62, 44, 58
TEXT = 6.6
"""Width of a letter at 12 px, on the wide side."""
ROW = 16
"""Height of a line of text."""
TINY = 1e-300
"""Differences below this have no logarithm to speak of; values that near are one."""
RAW_LIMIT = 400
"""Most points of a line that are drawn."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One quantity, in pieces where it was not measured in between."""

    name: str
    colour: str
    pieces: Sequence[Points] = ()
    raw: Sequence[Points] = ()
    """Drawn thin behind the pieces."""
    dots: bool = False
    ends: Sequence[tuple[float, float, tuple[float, float] | None]] = ()
    """(x, y, interval) of figures that close a piece: rings with whiskers from end to end of the interval."""
    level: float | None = None
    """Height of a dashed line from edge to edge, named ``level_name``."""
    level_name: str = ""

    @property
    def last(self) -> tuple[float, float] | None:
        """Where the line ends: its last ring, or its last point where that is later."""
        ends = [(x, y) for x, y, _ in self.ends]
        return max([*ends, *[piece[-1] for piece in self.pieces if piece]], key=lambda p: p[0], default=None)


@dataclass(frozen=True)
class Plot:
    """What is drawn, in units of the axes."""

    title: str
    y_name: str
    x_name: str
    stages: Sequence[tuple[str, float, float]]
    """(name, from, to) on the x axis."""
    lines: Sequence[Line]
    note: str = ""
    y_range: tuple[float, float] | None = None
    width: int = 560
    height: int = 270


@dataclass(frozen=True)
class Frame:
    """From units of the axes to pixels; values beyond the axis stay on its edge."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    right: float
    bottom: float
    x_ticks: Sequence[float] = field(default=())
    y_ticks: Sequence[float] = field(default=())


def draw(plot: Plot, *, alone: bool = False) -> str:
    """Return the SVG; ``alone`` gives one that is a file of its own, on white."""
    labels = _labels(plot)
    f = _frame(plot, max((len(text) for _, text, _ in labels), default=0))
    name, note = html.escape(plot.title), html.escape(plot.note)
    parts = [_stages(plot, f), _axes(plot, f), *(_line(line, f) for line in plot.lines), _named(labels, plot, f)]
    parts.append(f'<text class="title" x="12" y="22">{name}</text><text class="soft" x="12" y="39">{note}</text>')
    size = f'viewBox="0 0 {plot.width} {plot.height}" role="img" aria-label="{name}"'
    if not alone:
        return f'<svg class="plot" {size}>{"".join(parts)}</svg>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{plot.width}" height="{plot.height}" {size}>'
    return f'{head}<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that span ``low`` to ``high``, the outer ones at or beyond them."""
    if not high - low > TINY:
        spread = abs(low) if abs(low) > TINY else 1.0
        low, high = low - spread / 2, high + spread / 2
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move numbers as little as needed so that they lie ``gap`` apart in ``low``..``high``, in their order."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    out = list(wanted)
    floor = low
    for k in order:
        out[k] = max(wanted[k], floor)
        floor = out[k] + gap
    ceiling = high
    for k in reversed(order):
        out[k] = min(out[k], ceiling)
        ceiling = out[k] - gap
    return out


def _frame(plot: Plot, letters: int) -> Frame:
    values = [y for line in plot.lines for piece in line.pieces for _, y in piece]
    values += [y for line in plot.lines for _, y, _ in line.ends]
    values += [line.level for line in plot.lines if line.level is not None]
    low, high = plot.y_range or (min(values), max(values))
    rows = ticks(low, high)
    end = max((to for _, _, to in plot.stages), default=1.0) or 1.0
    right, bottom = plot.width - 34 - letters * TEXT, plot.height - BOTTOM
    columns = [tick for tick in ticks(0, end, max(3, int((right - LEFT) / 60))) if tick <= end]

    def x(value: float) -> float:
        return LEFT + value / end * (right - LEFT)

    def y(value: float) -> float:
        inside = min(max(value, rows[0]), rows[-1])
        return bottom - (inside - rows[0]) / (rows[-1] - rows[0]) * (bottom - TOP)

    return Frame(x, y, right, bottom, columns, rows)


def _stages(plot: Plot, f: Frame) -> str:
    """Bands, a border between neighbours, and each stage's name on top where it has room."""
    out = []
    for place, (name, start, end) in enumerate(plot.stages):
        a, b = f.x(start), f.x(end)
        if place % 2 == 0:
            out.append(f'<rect class="band" x="{a:.1f}" y="{TOP}" width="{b - a:.1f}" height="{f.bottom - TOP}"/>')
        if place:
            out.append(f'<line class="border" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{f.bottom}"/>')
        if b - a > len(name) * TEXT:
            middle = f'x="{(a + b) / 2:.1f}" y="{TOP - 6}" text-anchor="middle"'
            out.append(f'<text class="soft" {middle}>{html.escape(name)}</text>')
    return "".join(out)


def _axes(plot: Plot, f: Frame) -> str:
    out = []
    for tick in f.y_ticks:
        y = f.y(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{f.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in f.x_ticks:
        x = f.x(tick)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{f.bottom}" y2="{f.bottom + 4}"/>')
        out.append(f'<text class="soft" x="{x:.1f}" y="{f.bottom + 17}" text-anchor="middle">{number(tick)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{f.right:.1f}" y1="{f.bottom}" y2="{f.bottom}"/>')
    middle, height = (LEFT + f.right) / 2, (TOP + f.bottom) / 2
    x_name, y_name = html.escape(plot.x_name), html.escape(plot.y_name)
    out.append(f'<text class="soft" x="{middle:.1f}" y="{plot.height - 9}" text-anchor="middle">{x_name}</text>')
    turned = f'transform="translate(14 {height:.1f}) rotate(-90)" text-anchor="middle"'
    out.append(f'<text class="soft" {turned}>{y_name}</text>')
    return "".join(out)


def _line(line: Line, f: Frame) -> str:
    out = []
    if line.level is not None:
        across = f'x1="{LEFT}" x2="{f.right:.1f}" y1="{f.y(line.level):.1f}" y2="{f.y(line.level):.1f}"'
        out.append(f'<line {across} stroke="{line.colour}" stroke-dasharray="6 5"/>')
    out += [_path(piece, f, f'stroke="{line.colour}" stroke-width="0.8" opacity="0.3"') for piece in line.raw]
    for piece in line.pieces:
        out.append(_path(piece, f, f'stroke="{line.colour}" stroke-width="2"'))
        if line.dots:
            out += [f'<circle cx="{f.x(x):.1f}" cy="{f.y(y):.1f}" r="3" fill="{line.colour}"/>' for x, y in piece]
    for x, y, interval in line.ends:
        if interval:
            bottom, top = (f"{f.y(v):.1f}" for v in interval)
            left, stroke = f"{f.x(x) - 5:.1f}", f'stroke="{line.colour}" stroke-width="1.5"'
            out.append(f'<path d="M{left},{bottom}h10M{left},{top}h10M{f.x(x):.1f},{bottom}V{top}" {stroke}/>')
        place = f'cx="{f.x(x):.1f}" cy="{f.y(y):.1f}"'
        out.append(f'<circle {place} class="ring" r="4.5" stroke="{line.colour}" stroke-width="2.5"/>')
    return "".join(out)


def _path(points: Points, f: Frame, stroke: str) -> str:
    stride = max(1, len(points) // RAW_LIMIT)
    kept = [*points[:-1:stride], *points[-1:]]
    places = " ".join(f"{f.x(x):.1f},{f.y(y):.1f}" for x, y in kept)
    return f'<polyline fill="none" stroke-linejoin="round" {stroke} points="{places}"/>'


def _labels(plot: Plot) -> list[tuple[tuple[float | None, float], str, str]]:
    """((x or None = the right edge, y), text, colour) of everything that is named at the right."""
    out: list[tuple[tuple[float | None, float], str, str]] = []
    for line in plot.lines:
        if line.last is not None:
            out.append((line.last, line.name, line.colour))
        if line.level is not None:
            out.append(((None, line.level), line.level_name, line.colour))
    return out


def _named(labels: Sequence[tuple[tuple[float | None, float], str, str]], plot: Plot, f: Frame) -> str:
    """The names beside the ends of their lines, moved apart; a thin line leads from the end to the name."""
    heights = spread([f.y(y) for (_, y), _, _ in labels], ROW, TOP, f.bottom)
    out = []
    for ((x, y), text, colour), height in zip(labels, heights, strict=True):
        start = f.right if x is None else f.x(x) + 6
        bend = max(start, f.right)
        points = f"{start:.1f},{f.y(y):.1f} {bend:.1f},{f.y(y):.1f} {f.right + 18:.1f},{height:.1f}"
        dashes = ' stroke-dasharray="6 5"' if x is None else ""
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="0.9"{dashes} points="{points}"/>')
        out.append(f'<text x="{f.right + 22:.1f}" y="{height + 4:.1f}">{html.escape(text)}</text>')
    return "".join(out)


def number(value: float) -> str:
    """A short number for an axis or a label."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
