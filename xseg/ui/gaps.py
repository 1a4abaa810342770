"""The oracle gap of an evaluation as tables with bars: what was never drawn, and what was drawn but not chosen."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xseg.metrics.oracle import SIZES, WORDS

ORACLE, CHOSEN, GAP = "oracle IoU", "chosen IoU", "selection gap"
SIZE_NAMES, WORD_NAMES = tuple(name for name, _ in SIZES), tuple(name for name, _ in WORDS)
ABOUT = (
    "Mean IoU of the mask that was given out, and of the best of all the decoder's masks. From the first to the second "
    "is selection error: a better mask was there. From the second to 100 is generation error: no mask was better."
)


@dataclass(frozen=True)
class Group:
    """Targets of one size, phrase length or category."""

    name: str
    oracle: float
    """Mean IoU in percent of the best mask of each target."""
    gap: float
    """By how much the chosen masks fall short of it."""
    targets: int

    @property
    def chosen(self) -> float:
        """Mean IoU in percent of the masks that were given out."""
        return self.oracle - self.gap


def is_part(row: Mapping[str, Any]) -> bool:
    """Whether a row of results.json is the oracle gap of a group, which stands in these tables alone."""
    return str(row["metric"]).startswith((f"{ORACLE}:", f"{GAP}:"))


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Group]]:
    """Sort the oracle rows of one data set into breakdowns: title -> groups, empty breakdowns left out.

    Sizes and lengths go from small to large, categories from the largest gap to the smallest.
    """
    values = {str(r["metric"]): r for r in rows}
    found = [
        Group(name.partition(":")[2], row["value"], values[name.replace(ORACLE, GAP, 1)]["value"], row["n"])
        for name, row in values.items()
        if name.startswith(f"{ORACLE}:")
    ]
    whole = values.get(ORACLE)
    out = {"": [Group("all", whole["value"], values[GAP]["value"], whole["n"])] if whole else []}
    for title, names in (("by size", SIZE_NAMES), ("by length of the phrase", WORD_NAMES)):
        out[title] = sorted((g for g in found if g.name in names), key=lambda g, names=names: names.index(g.name))  # type: ignore[misc]
    rest = [g for g in found if g.name not in (*SIZE_NAMES, *WORD_NAMES)]
    out["by category"] = sorted(rest, key=lambda g: (-g.gap, g.name))
    return {title: members for title, members in out.items() if members}


def section(results: Mapping[str, Any]) -> str:
    """The HTML of all data sets of an evaluation whose tasks report the gap; "" without any."""
    by_set: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if str(row["metric"]).partition(":")[0] in (ORACLE, CHOSEN, GAP):
            by_set.setdefault((row["dataset"], row.get("row", 0)), []).append(row)
    panels = [_panel(dataset, groups(rows)) for (dataset, _), rows in by_set.items()]
    if not panels:
        return ""
    legend = '<span class="split key"><i></i></span> given out <span class="split key"><b></b></span> best of all masks'
    about = f'<p class="note">{ABOUT} {legend}</p>'
    return f"<h2>Where masks fall short <small>suite {_e(results['suite'])}</small></h2>{about}{''.join(panels)}"


def _panel(dataset: str, found: Mapping[str, Sequence[Group]]) -> str:
    tables = "".join(_table(title, members) for title, members in found.items())
    return f'<div class="panel"><h3>{_e(dataset)}</h3><div class="gaps">{tables}</div></div>'


def _table(title: str, members: Sequence[Group]) -> str:
    head = f"<tr><th>{title or 'all targets'}</th>" + "".join(
        f'<th class="number">{name}</th>' for name in ("", "given out", "best", "gap", "n")
    )
    return f"<table>{head}</tr>{''.join(map(_line, members))}</table>"


def _line(group: Group) -> str:
    bar = (
        f'<span class="split"><b style="width:{group.oracle:.1f}%"></b><i style="width:{group.chosen:.1f}%"></i></span>'
    )
    figures = (f"{group.chosen:.1f}", f"{group.oracle:.1f}", f"{group.gap:.1f}", str(group.targets))
    cells = "".join(f'<td class="number">{figure}</td>' for figure in figures)
    return f"<tr><td>{_e(group.name)}</td><td>{bar}</td>{cells}</tr>"


def _e(text: str) -> str:
    return html.escape(str(text))
