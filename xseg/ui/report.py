"""A run as one static page: results beside published values and blind baselines, curves, worst and best samples."""

import html
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xseg.errors import UserError
from xseg.infer.summary import is_blind
from xseg.ui.curves import Trained, held_out_plot, read_run, training_plots
from xseg.ui.gallery import Card, Gallery, galleries
from xseg.ui.gaps import is_part, section
from xseg.ui.plot import draw

DEPTH = 3
"""How deep below the run's folder results and curves are looked for."""


def write_report(run: Path, data_root: Path | None = None) -> Path:
    """Write ``run``/report/index.html with its pictures beside it and return the file; nothing external is loaded.

    ``curves.svg`` beside it is the picture of the held-out figures on its own, where the run has any.
    ``data_root`` replaces the data folder that the results name. The page appears complete or not at all. Raises
    UserError when there is nothing to report.
    """
    results, curves = _results(run), _files(run, "metrics.jsonl")
    if not results and not curves:
        raise UserError(f"{run}: no results.json and no metrics.jsonl here; give the folder of a run (runs/demo)")
    partial, final = run / "report.partial", run / "report"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    shown, notes = _galleries(results, data_root, partial / "pictures")
    sections = [_head(run, results)]
    for place, found in results:
        sections += [_table(place, found), section(found)]
    stages = read_run(run, curves, results)
    sections.append(_curves(stages))
    if held_out := held_out_plot(stages):
        (partial / "curves.svg").write_text(draw(held_out, alone=True), encoding="utf8")
    sections += [f'<p class="note">{_e(note)}</p>' for note in notes]
    sections.append('<a id="samples"></a>')
    sections += [_gallery(place, gallery) for place, gallery in shown]
    (partial / "index.html").write_text(_page(run.resolve().name, sections), encoding="utf8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return final / "index.html"


def _files(run: Path, name: str) -> list[Path]:
    found = [p for p in run.rglob(name) if len(p.relative_to(run).parts) <= DEPTH]
    return sorted(p for p in found if "report" not in p.relative_to(run).parts)


def _results(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Evaluations of a run, the last stage's first: every folder that holds results.json and samples.jsonl."""
    out = []
    for path in reversed(_files(run, "results.json")):
        if (path.parent / "samples.jsonl").is_file():
            out.append((path.parent, json.loads(path.read_text(encoding="utf8"))))
    return out


def _galleries(
    results: Sequence[tuple[Path, dict[str, Any]]], data_root: Path | None, pictures: Path
) -> tuple[list[tuple[Path, Gallery]], list[str]]:
    shown, notes = [], []
    for place, found in results:
        try:
            root = data_root or Path(found.get("data_root", "data"))
            shown += [(place, gallery) for gallery in galleries(place, root, pictures)]
        except UserError as error:
            notes.append(f"No pictures of {place.name}: {error}")
    return shown, notes


def _head(run: Path, results: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    facts, short = [], ""
    for _, found in results[:1]:
        short = _summary(found["summary"]) if "summary" in found else ""  # evaluations of earlier versions have none
        commit = (found.get("commit") or "no git checkout")[:12]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        facts = [f"commit {commit}", versions]
    links = '<nav><a href="#results">Results</a><a href="#curves">Curves</a><a href="#samples">Samples</a></nav>'
    title = f'<h1>{_e(run.resolve().name)}</h1><p class="facts">{_e(" · ".join(facts))}</p>'
    return f'{title}{links}<a id="results"></a>{short}'


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line per data set: its headline, the blind guess, and how much of the way to the maximum is gone."""
    lines = []
    for row in rows:
        blind = "" if row["blind"] is None else f"{row['blind']:.1f}"
        closed = "" if row["closed"] is None else f"{row['closed']:.0f} %"
        width = min(max(row["closed"] or 0, 0), 100)
        cells = (
            (_e(row["dataset"]), ""),
            (_e(row["metric"]), ""),
            (f"{row['value']:.1f}", "number value"),
            (blind, "number"),
            (f"{row['maximum']:.0f}", "number"),
            (f'{closed}<span class="bar"><i style="width:{width:.1f}%"></i></span>', "number"),
            (_e(row["blind_protocol"] or "no blind baseline"), "protocol"),
        )
        lines.append("<tr>" + "".join(f'<td class="{kind}">{text}</td>' for text, kind in cells) + "</tr>")
    names = ("data set", "metric", "value", "blind", "maximum", "closed", "what blind is")
    head = "".join(f'<th class="{"number" if 1 < k < 6 else ""}">{name}</th>' for k, name in enumerate(names))
    title = "<h2>From the blind guess to the maximum</h2>"
    return f'{title}<div class="panel"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _table(place: Path, found: dict[str, Any]) -> str:
    """One table per evaluation; blind baselines stand in a column, parts of the oracle gap in tables of their own."""
    blind = {_row_key(r): r["value"] for r in found["rows"] if is_blind(r)}
    shown = [r for r in found["rows"] if not is_blind(r) and not is_part(r)]
    rows = [_row(r, before, blind.get(_row_key(r))) for r, before in zip(shown, [{}, *shown], strict=False)]
    head = "".join(
        f'<th class="{kind}">{name}</th>'
        for name, kind in (
            ("data set", ""),
            ("metric", ""),
            ("value", "number"),
            ("95 %", "number"),
            ("blind", "number"),
            ("published", "number"),
            ("n", "number"),
            ("protocol", ""),
        )
    )
    title = f"Suite {_e(found['suite'])} <small>{_e(_shown(place))}</small>"
    return f'<h2>{title}</h2><div class="panel"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _row(row: dict[str, Any], before: dict[str, Any], blind: float | None) -> str:
    """One line; what the line before says already is left blank."""
    low_high = "–".join(f"{v:.1f}" for v in row["ci95"]) if row["ci95"] else ""
    mark = "" if blind is None else f'<b style="left:{min(max(blind, 0), 100):.1f}%" title="blind {blind:.1f}"></b>'
    bar = f'<span class="bar"><i style="width:{min(max(row["value"], 0), 100):.1f}%"></i>{mark}</span>'
    published = ""
    if "published" in row:
        published = f'<span title="{_e(row.get("published_source", ""))}">{row["published"]:.1f}</span>'
    cells = (
        ("" if row["dataset"] == before.get("dataset") else _e(row["dataset"]), ""),
        (_e(row["metric"]), ""),
        (f"{row['value']:.1f}{bar}", "number value"),
        (low_high, "number"),
        ("" if blind is None else f"{blind:.1f}", "number"),
        (published, "number"),
        (str(row["n"]), "number"),
        ("" if row["protocol"] == before.get("protocol") else _e(row["protocol"]), "protocol"),
    )
    return "<tr>" + "".join(f'<td class="{kind}">{text}</td>' for text, kind in cells) + "</tr>"


def _curves(stages: Sequence[Trained]) -> str:
    held_out = held_out_plot(stages)
    wide = f'<div class="wide">{draw(held_out)}</div>' if held_out else ""
    charts = "".join(map(draw, training_plots(stages)))
    return f'<h2 id="curves">Training</h2>{wide}<div class="charts">{charts}</div>'


def _gallery(place: Path, gallery: Gallery) -> str:
    parts = [f"<h2>{_e(gallery.title)} <small>{_e(_shown(place))}</small></h2>"]
    for name, cards in (("Worst", gallery.worst), ("Best", gallery.best)):
        parts.append(f'<h3>{name} {len(cards)}</h3><div class="cards">{"".join(map(_card, cards))}</div>')
    return "".join(parts)


def _card(card: Card) -> str:
    figures = "".join(
        f'<figure><img loading="lazy" src="pictures/{_e(file)}" alt="{_e(caption)} of {_e(card.key)}">'
        f"<figcaption>{_e(caption)}</figcaption></figure>"
        for caption, file in card.pictures
    )
    only = " only" if len(card.pictures) == 1 else ""
    lines = "".join(f"<dt>{_e(who)}</dt><dd>{_e(text)}</dd>" for who, text in card.lines)
    return (
        f'<article class="card"><header><span>{_e(card.key)}</span><b>{_e(card.score)}</b></header>'
        f'<div class="pictures{only}">{figures}</div><dl>{lines}</dl></article>'
    )


def _page(title: str, sections: Sequence[str]) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)} · xseg</title><style>{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _row_key(row: dict[str, Any]) -> tuple[str, str, str, int | None]:
    """What a row and its blind baseline share; one data set may be scored several times, by options of its task."""
    return row["task"], row["dataset"], row["metric"], row.get("row")


def _shown(place: Path) -> str:
    return "/".join(place.parts[-2:])


def _e(text: str) -> str:
    return html.escape(str(text))
