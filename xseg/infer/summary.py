"""The short form of an evaluation: one line per row of a suite, and how far it is from guessing to perfect."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xseg.config import Suite
from xseg.errors import did_you_mean

PERFECT = 100.0
PERFECT_OF = {"CIDEr": 1000.0}
"""Maximum of the metrics that are no percentages."""


def is_blind(row: Mapping[str, Any]) -> bool:
    """Whether a row of results.json is a blind baseline."""
    return str(row["protocol"]).startswith("blind")


def summary(
    suite: Suite, rows: Sequence[dict[str, Any]], note: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Return one record per row of the suite that was scored, from the ``rows`` of results.json.

    A record has the headline metric's value, 95 % interval, n and protocol; the blind baseline of the same metric and
    what it guesses by; ``closed``, the part in percent of the way from blind to ``maximum`` that the value goes (less
    than 0 = worse than guessing; None without a baseline); and ``oracle IoU`` and ``selection gap`` where masks are
    chosen. A row whose headline is no metric of its task is left out, which ``note`` is told.
    """
    out = []
    for number, row in enumerate(suite.rows):
        # a recipe may stand in a suite twice, with other options: its place tells which, where the results have it
        mine = [r for r in rows if r["dataset"] == row.recipe and r.get("row", number) == number]
        scores = {r["metric"]: r for r in reversed(mine) if not is_blind(r)}
        guesses = {r["metric"]: r for r in mine if is_blind(r)}
        name = row.headline or next(reversed(scores), "")
        if name not in scores:
            if scores:
                note(f"{row.recipe}: headline {name!r} is not in the summary{did_you_mean(name, scores)}")
            continue
        found, guess = scores[name], guesses.get(name)
        maximum = PERFECT_OF.get(name, PERFECT)
        kept = {k: found[k] for k in ("task", "dataset", "metric", "value", "ci95", "n", "protocol")}
        out.append(
            {
                **kept,
                "blind": guess and guess["value"],
                "blind_protocol": guess and guess["protocol"],
                "maximum": maximum,
                "closed": _closed(found["value"], guess["value"], maximum) if guess else None,
                **{name: scores[name]["value"] for name in ("oracle IoU", "selection gap") if name in scores},
            }
        )
    return out


def _closed(value: float, blind: float, maximum: float) -> float | None:
    return round(100 * (value - blind) / (maximum - blind), 1) if blind < maximum else None
