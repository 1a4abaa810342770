"""The worst and best samples of an evaluation as pictures: input, truth, prediction."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xseg.config import DataRecipe, load_recipe
from xseg.data.sources import load_source
from xseg.geometry import masks as rle
from xseg.geometry.views import read_image
from xseg.types import Sample, Segment
from xseg.ui.draw import overlay

WORST, BEST = 50, 8
"""Most samples of a data set that are shown; of few samples each half goes to one side."""
WIDEST = 420
"""Pictures are reduced to this width in pixels."""


@dataclass(frozen=True)
class Card:
    """One sample of the gallery."""

    key: str
    score: str
    """Its scores in words."""
    pictures: tuple[tuple[str, str], ...]
    """(caption, file name)."""
    lines: tuple[tuple[str, str], ...]
    """(who, text): question, truth and answer."""


@dataclass(frozen=True)
class Gallery:
    """The samples of one data set of one evaluation."""

    title: str
    worst: tuple[Card, ...]
    best: tuple[Card, ...]


def galleries(evaluation: Path, data_root: Path, pictures: Path) -> Iterator[Gallery]:
    """Draw the worst and best samples of each data set in ``evaluation``/samples.jsonl into ``pictures``.

    Raises UserError when the data set is not under ``data_root`` any more.
    """
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with (evaluation / "samples.jsonl").open(encoding="utf8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.setdefault((row["dataset"], row.get("row", 0)), []).append(row)
    for (dataset, number), found in rows.items():
        recipe = load_recipe(DataRecipe, dataset)
        source = load_source(recipe.source, data_root, recipe.split, recipe.options)
        ranked = sorted((r for r in found if r["scores"]), key=_score)
        half = (len(ranked) + 1) // 2
        stem = f"{evaluation.parent.name}-{evaluation.name}-{number}-{dataset}".replace("/", "-")
        worst, best = (
            tuple(card(source[r["index"]], r, pictures, f"{stem}-{r['index']}") for r in rows_of_side)
            for rows_of_side in (ranked[: min(WORST, half)], ranked[::-1][: min(BEST, half)])
        )
        yield Gallery(f"{dataset} ({found[0]['task']})", worst, best)


def card(sample: Sample, row: dict[str, Any], pictures: Path, stem: str) -> Card:
    """Draw one sample's pictures as ``pictures/stem-*.png`` and collect its texts."""
    drawn: list[tuple[str, str]] = []
    if sample.images:
        image = read_image(sample.images[0], sample.key)
        shown: list[tuple[str, list[Segment]]] = [("input", [])]
        if sample.masks is not None:
            shown += [("truth", truth(sample)), ("prediction", predicted(row))]
        for caption, segments in shown:
            name = f"{stem}-{caption}.png"
            reduced(overlay(image, segments)).save(pictures / name, compress_level=1)
            drawn.append((caption, name))
    scores = ", ".join(f"{name} {value:.1f}" for name, value in row["scores"].items())
    return Card(sample.key, scores, tuple(drawn), tuple(texts(sample, row)))


def truth(sample: Sample, rows: Collection[int] | None = None) -> list[Segment]:
    """The annotated masks: one per phrase where there are phrases, else one per instance; of mask ``rows`` only."""
    if sample.masks is None:
        return []
    names = sample.categories.names if sample.categories else ()
    if sample.phrases:
        groups = [(p.text, [sample.instances[i].mask for i in p.instances]) for p in sample.phrases]
    else:
        groups = [(names[i.category] if names and i.category >= 0 else "", [i.mask]) for i in sample.instances]
    out = []
    for label, members in groups:
        parts = [rle.row_rle(sample.masks, row) for row in members if rows is None or row in rows]
        if parts:
            out.append(Segment(rle.union(parts), label=label))
    return out


def predicted(row: dict[str, Any]) -> list[Segment]:
    """The masks of a line of samples.jsonl."""
    return [Segment(rle.from_json(s["mask"]), s["category"], s["score"], s["label"]) for s in row["segments"]]


def texts(sample: Sample, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Question, truth and answer; for phrases whether each was found."""
    for k, phrase in enumerate(sample.phrases):
        found = rle.area(rle.from_json(row["segments"][k]["mask"])) > 0 if k < len(row["segments"]) else False
        there = "in the image" if phrase.instances else "not in the image"
        yield phrase.text, f"{there}; {'a mask' if found else 'no mask'} predicted"
    if sample.turns:
        for turn in sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns:
            yield turn.role, turn.text.replace("<image>", "").strip()
        if sample.turns[-1].role == "assistant":
            yield "truth", sample.turns[-1].text
    if sample.turns or row["text"]:
        yield "model", row["text"]


def reduced(image: Image.Image) -> Image.Image:
    """At most ``WIDEST`` pixels wide."""
    if image.width <= WIDEST:
        return image
    return image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)


def _score(row: dict[str, Any]) -> float:
    scores: Sequence[float] = list(row["scores"].values())
    return scores[0]
