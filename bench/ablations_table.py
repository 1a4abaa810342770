"""The table of ``bench/ablations.py``: means, spreads, and whether they agree with the paper, all computed."""

import statistics
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from ablations_plan import Group, Plan, Settings

RULE = (
    "Differences are paired by seed. Ours agrees with the paper's when the mean difference has the same sign and is "
    "larger than its standard deviation over the seeds, disagrees when the sign is the other one and it is larger, and "
    "is undecided otherwise, or with fewer than two seeds. The paper gives single runs."
)
Results = Mapping[tuple[str, int], Mapping[str, Any]]
"""(training, seed) -> what ``ablations.py`` stored."""


def summarise(plan: Plan, settings: Settings, results: Results) -> dict[str, Any]:
    """Everything the table says, as plain data."""
    groups = {name: _group(plan, group, settings, results) for name, group in plan.groups.items()}
    over = {
        f"{name}, seed {seed}": stored["seconds"]["train"]
        for (name, seed), stored in results.items()
        if stored["seconds"]["train"] > settings.max_seconds
    }
    trainings = {name for row in plan.rows().values() for name in plan.lineage(row.training)}
    return {
        "claim": "what each of the paper's choices is worth on ShapeWorld, and whether that agrees with its Tables 6-9",
        "command": "python bench/ablations.py",
        "settings": settings.model_dump(mode="json"),
        "commits": sorted({stored["commit"] for stored in results.values()}),
        "runs_done": len(results),
        "runs_in_all": len(trainings) * len(settings.seeds),
        "train_seconds": round(sum(stored["seconds"]["train"] for stored in results.values()), 1),
        "over_the_limit": over,
        "rule": RULE,
        "groups": groups,
    }


def _group(plan: Plan, group: Group, settings: Settings, results: Results) -> dict[str, Any]:
    rows = {name: _row(plan, group, name, settings, results) for name in group.rows}
    pairs = list(_pairs(group, rows))
    verdicts = [pair["verdict"] for pair in pairs if pair["paper"] is not None]
    head = {"title": group.title, "table": group.table, "note": group.note, "metrics": group.metrics}
    return {**head, "rows": rows, "differences": pairs, "verdict": verdict_of_group(verdicts)}


def _row(plan: Plan, group: Group, name: str, settings: Settings, results: Results) -> dict[str, Any]:
    row, lineage = group.rows[name], plan.lineage(group.rows[name].training)
    own = {seed: results[row.training, seed] for seed in settings.seeds if (row.training, seed) in results}
    metrics: dict[str, Any] = {}
    for metric in group.read_by(name):
        found = {seed: next((r for r in o["rows"] if r["metric"] == metric), None) for seed, o in own.items()}
        values = {seed: r["value"] for seed, r in found.items() if r is not None}
        if values:
            some = next(r for r in found.values() if r is not None)
            metrics[metric] = {"mean": round(statistics.fmean(values.values()), 2), "spread": spread(values.values())}
            metrics[metric] |= {"by_seed": values, "n": some["n"], "protocol": some["protocol"]}
            metrics[metric]["data"] = some["dataset"]
    seconds = [o["seconds"]["train"] for o in own.values()]
    return {
        "trainings": lineage,
        "steps": [settings.steps_of(training) for training in lineage],
        "seeds": list(own),
        "seconds": round(statistics.fmean(seconds), 1) if seconds else None,
        "metrics": metrics,
        "paper": row.paper,
    }


def _pairs(group: Group, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every later row less every earlier one, where the paper has both numbers or the later one is the full method."""
    full = list(rows)[-1]
    for metric in group.metrics:
        for less, more in combinations(rows, 2):
            numbers = [group.rows[name].paper.get(metric) for name in (less, more)]
            both = None not in numbers
            ours = [rows[name]["metrics"].get(metric, {}).get("by_seed", {}) for name in (less, more)]
            read = all(metric in group.read_by(name) for name in (less, more))
            if not read or not (both or more == full):
                continue
            found = [ours[1][seed] - ours[0][seed] for seed in ours[0] if seed in ours[1]]
            paper = round(numbers[1] - numbers[0], 2) if both else None  # type: ignore[operator]
            yield {
                "metric": metric,
                "rows": [less, more],
                "ours": round(statistics.fmean(found), 2) if found else None,
                "spread": spread(found),
                "seeds": len(found),
                "paper": paper,
                "verdict": verdict(found, paper),
            }


def spread(values: Any) -> float | None:
    """Standard deviation over seeds (n - 1), or None for fewer than two."""
    found = list(values)
    return round(statistics.stdev(found), 2) if len(found) > 1 else None


def verdict(ours: list[float], paper: float | None) -> str:
    """Whether differences by seed say what the paper's difference says; see ``RULE``."""
    if paper is None:
        return "no number in the paper"
    if len(ours) < 2 or abs(statistics.fmean(ours)) <= statistics.stdev(ours):
        return "undecided"
    return "agrees" if statistics.fmean(ours) * paper > 0 else "disagrees"


def verdict_of_group(verdicts: list[str]) -> str:
    """One line for a group."""
    counts = {word: verdicts.count(word) for word in ("agrees", "disagrees", "undecided")}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "nothing to compare"
    if counts["agrees"] and not counts["disagrees"]:
        word = "agrees with the paper" if not counts["undecided"] else "agrees with the paper as far as it is decided"
    elif counts["disagrees"]:
        word = "does not agree with the paper" if not counts["agrees"] else "agrees with the paper in part"
    else:
        word = "undecided"
    return f"{word} ({told})"


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    s = summary["settings"]
    lines = [
        "# Ablations on ShapeWorld",
        "",
        f"`{summary['command']}`: {s['images']} training pictures of {s['side']} px, {s['val_images']} held-out ones, "
        f"seeds {', '.join(map(str, s['seeds']))}; {summary['runs_done']} of {summary['runs_in_all']} trainings done, "
        f"{summary['train_seconds']:.0f} s of training on one core each. Values are mean ± standard deviation over "
        "seeds, in percent; X-SAM's own numbers, on its own data, stand in brackets. The two columns of numbers are "
        "about different pictures: only the signs of differences are compared.",
        "",
        summary["rule"],
    ]
    for group in summary["groups"].values():
        lines += ["", f"## {group['title']}: {group['verdict']}", "", *_values(group), "", *_differences(group)]
        lines += ["", group["note"]] * bool(group["note"])
        lines += ["", *(f"- {text}" for text in _protocols(group))]
    if summary["over_the_limit"]:
        told = "; ".join(f"{name}: {seconds:.0f} s" for name, seconds in summary["over_the_limit"].items())
        lines += ["", f"Over {s['max_seconds']:.0f} s: {told}."]
    return "\n".join(lines).rstrip() + "\n"


def _values(group: Mapping[str, Any]) -> list[str]:
    names = list(group["metrics"])
    lines = [f"| row | {' | '.join(names)} | steps | seconds | seeds |", "|---" * (len(names) + 4) + "|"]
    for name, row in group["rows"].items():
        cells = [_cell(row["metrics"].get(metric), row["paper"].get(metric)) for metric in names]
        steps = " + ".join(map(str, row["steps"]))
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {steps} | {seconds} | {len(row['seeds'])} |")
    return lines


def _cell(found: Mapping[str, Any] | None, paper: float | None) -> str:
    ours = "" if found is None else f"{found['mean']:.1f}"
    if found is not None and found["spread"] is not None:
        ours += f" ± {found['spread']:.1f}"
    return f"{ours} ({paper:.1f})".strip() if paper is not None else ours


def _differences(group: Mapping[str, Any]) -> list[str]:
    lines = [f"| difference | metric | ours | {group['table']} | |", "|---|---|---|---|---|"]
    for pair in group["differences"]:
        ours = "" if pair["ours"] is None else f"{pair['ours']:+.1f}"
        ours += "" if pair["spread"] is None else f" ± {pair['spread']:.1f}"
        paper = "" if pair["paper"] is None else f"{pair['paper']:+.1f} ({group['metrics'][pair['metric']]})"
        less, more = pair["rows"]
        lines.append(f"| {more} less {less} | {pair['metric']} | {ours} | {paper} | {pair['verdict']} |")
    return lines


def _protocols(group: Mapping[str, Any]) -> list[str]:
    told: dict[str, str] = {}
    for row in group["rows"].values():
        for metric, found in row["metrics"].items():
            told[metric] = f"{metric}: {found['data']}, n = {found['n']}; {found['protocol']}"
    return list(told.values())
