"""``xseg data lint``: everything wrong with the data of recipes, all of it at once, with file and record.

Training stops at the first fault it meets; lint goes on. Formats whose reader checks a whole file at the start (COCO,
REFER, LLaVA) are first gone through record by record (``lint_records``); then every sample of a recipe that opens is
read, with its pictures, and given to its task as training would (``lint_text``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xseg.config import DataRecipe
from xseg.data import checksums, lint_records, lint_text
from xseg.data.lint_records import Fault, outside
from xseg.data.parallel import ordered
from xseg.data.sources import Source, load_source, reason
from xseg.errors import UserError
from xseg.geometry.masks import area, decode, row_rle
from xseg.geometry.views import read_image
from xseg.tasks import load_task
from xseg.types import Sample, Size

COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})")
"""COCO's pictures are the same whatever release they are named after."""
COCO_SUFFIXES = (".jpg", ".jpeg")
"""All of COCO's are photographs; drawn pictures (PNG) that are numbered in the same way are others in every folder."""
SHOWN = 5
"""Pairs of samples that a leak names."""
Seen = dict[Path, tuple[Size, str]]
"""What is known of the pictures opened so far: many samples share one."""


@dataclass
class Report:
    """What lint found in one recipe."""

    recipe: str
    split: str
    samples: int = 0
    faults: list[Fault] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    """Picture (``identity``) -> key of the first sample that shows it."""
    sums: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the annotation files for which the recipe of a set that can be downloaded states no checksum."""


@dataclass(frozen=True)
class _Found:
    """What a worker says about one sample."""

    key: str
    faults: tuple[Fault, ...]
    pictures: tuple[str, ...]


def lint(recipes: Mapping[str, DataRecipe], root: Path, workers: int = 1) -> tuple[list[Report], list[Fault]]:
    """Check every recipe, and the pictures that training and evaluation recipes share.

    Returns a report per recipe, and the leaks between them: a recipe whose split's name starts with "train" and one
    whose does not, with a picture in common (RefCOCO, RefCOCO+ and RefCOCOg are all drawn from COCO train2014).
    """
    reports = [_lint_one(name, recipe, root, workers) for name, recipe in recipes.items()]
    return reports, list(_leaks(reports))


def _lint_one(name: str, recipe: DataRecipe, root: Path, workers: int) -> Report:
    report = Report(name, recipe.split, faults=lint_records.check(recipe, root))
    report.faults += [Fault("checksum", text) for text in checksums.faults(recipe, root)]
    if recipe.download:  # a set that others fetch too: its recipe may say which version it speaks of
        report.sums = checksums.unstated(recipe, root)
    try:
        source = load_source(recipe.source, root, recipe.split, recipe.options)
    except UserError as error:
        if not report.faults:
            report.faults.append(Fault("record", str(error)))
            return report
        listed = _PictureCheck(lint_records.pictures(recipe, root))
        report.faults += [fault for faults in ordered(listed, len(listed.rows), workers) for fault in faults]
        return report
    report.samples = len(source)
    if not report.samples:
        report.faults.append(Fault("no sample", f"{name}: not one sample in its files; check the recipe's options"))
    report.faults += list(lint_text.names(source.categories, name))
    if recipe.count is not None and recipe.count != report.samples:
        report.faults.append(Fault("count", f"{name}: {report.samples} samples, the recipe states {recipe.count}"))
    # what the record check says about a file, its samples would say again in other words
    checked = recipe.source in lint_records.CHECKS and "panoptic_json" not in recipe.options
    once = {"record", "mask empty", "text empty"} if checked else set()
    known, keys = {fault.text for fault in report.faults}, set()
    check = _Check(source, _task(recipe, report), recipe.split.startswith("train"))
    for found in ordered(check, len(source), workers):
        if found.key and found.key in keys:
            report.faults.append(Fault("duplicate id", f"{found.key}: two samples of this key; ids are unique"))
        keys.add(found.key)
        for fault in found.faults:
            if fault.kind in once:
                continue
            told = fault.about or fault.text
            if told not in known:
                known.add(told)
                report.faults.append(fault)
        for picture in found.pictures:
            report.pictures.setdefault(picture, found.key)
    return report


def _task(recipe: DataRecipe, report: Report) -> Any:
    """The task that is asked what it refuses; None where it cannot be asked, or would say again what is told."""
    try:
        task = load_task(recipe.task)
    except UserError as error:
        report.faults.append(Fault("task", str(error)))
        return None
    return None if any(fault.kind == "marker" for fault in report.faults) else task


@dataclass(frozen=True)
class _Check:
    """Everything about the sample of a number."""

    source: Source
    task: Any
    """Its recipe's task, or None."""
    train: bool
    seen: Seen = field(default_factory=dict)

    def __call__(self, index: int) -> _Found:
        try:
            sample = self.source[index]
        except UserError as error:
            return _Found("", (Fault("record", str(error)),), ())
        faults = [*_pictures(sample, self.seen), *_masks(sample), *(said := list(lint_text.texts(sample)))]
        if self.task is not None and not said:
            faults += lint_text.refused(sample, self.task, index, train=self.train)
        if getattr(self.source, "id_maps", None) is not None:
            faults += _unlisted(sample)
        if isinstance(self.source, reason.Source):
            faults += _untargeted(sample)
        outlines = getattr(self.source, "outlines", None)
        if outlines is not None and sample.size != (0, 0):
            try:
                faults += [f for place, polygon in outlines(index) for f in outside(polygon, sample.size, place)]
            except UserError as error:  # an outline that the sample does not use
                faults.append(Fault("record", str(error)))
        pictures = tuple(identity(image) for image in sample.images if isinstance(image, Path))
        return _Found(sample.key, tuple(faults), pictures)


def identity(path: Path) -> str:
    """Return a name that two files of the same picture share: COCO's number, else the resolved path."""
    match = COCO_NAME.fullmatch(path.stem) if path.suffix.lower() in COCO_SUFFIXES else None
    return f"coco {match[1]}" if match else str(path.resolve())


@dataclass(frozen=True)
class _PictureCheck:
    """The pictures a file lists, where its samples cannot be read: (file, stated size, place)."""

    rows: Sequence[tuple[Path, Size, str]]

    def __call__(self, index: int) -> tuple[Fault, ...]:
        return tuple(_picture(*self.rows[index], {}))


def _pictures(sample: Sample, seen: Seen) -> Iterator[Fault]:
    stated: Size = sample.size if sample.masks is None else sample.masks.size
    for number, image in enumerate(sample.images):
        if isinstance(image, Path):
            yield from _picture(image, (0, 0) if number else stated, sample.key, seen)


def _picture(path: Path, stated: Size, where: str, seen: Seen) -> Iterator[Fault]:
    """Whether a picture is there, can be decoded, and has the stated (H, W); (0, 0) = none is stated."""
    if path not in seen:
        seen[path] = _opened(path)
    size, error = seen[path]
    if error:
        yield Fault("image unreadable" if path.is_file() else "image missing", f"{where}: {error}", str(path))
    elif stated not in ((0, 0), size):
        yield Fault(
            "image size",
            f"{where}: image {path} is {list(size)} (height, width), its annotation says {list(stated)}: masks only "
            "fit the image they were drawn on; fetch the original or repair the size",
        )


def _opened(path: Path) -> tuple[Size, str]:
    """(H, W) of a picture, decoded as a whole, and what is wrong with it."""
    try:
        picture = read_image(path, "picture")
    except UserError as error:
        return (0, 0), str(error).removeprefix("picture: ")
    return (picture.height, picture.width), ""


def _masks(sample: Sample) -> Iterator[Fault]:
    masks = sample.masks
    if masks is None:
        return
    if masks.id_map is not None:
        areas = [int(n) for n in _counts(masks.id_map, masks.ids)]
    else:
        areas = [area(rle) for rle in masks.rles]
    for number, instance in enumerate(sample.instances):
        place = f"{sample.key}: instance {number} (id {instance.id})"
        stuff = sample.categories is not None and instance.category >= 0
        stuff = stuff and not sample.categories.is_thing[instance.category]  # type: ignore[union-attr]
        if not areas[instance.mask]:
            yield Fault("mask empty", f"{place}: its mask has no pixel; take it out or draw it")
        elif areas[instance.mask] == masks.size[0] * masks.size[1] and not stuff:
            yield Fault("mask oversize", f"{place}: its mask covers the whole picture; draw the object's outline")
        point = instance.prompts.get("point")
        if point is not None and not (decode(point) & decode(row_rle(masks, instance.mask))).any():
            yield Fault("prompt", f"{place}: its point lies on no pixel of its mask; draw it anew")


def _unlisted(sample: Sample) -> Iterator[Fault]:
    """Segments that a panoptic PNG has and its record has not."""
    assert sample.masks is not None and sample.masks.id_map is not None
    others = sorted(set(np.unique(sample.masks.id_map).tolist()) - {0, *sample.masks.ids})
    if others:
        yield Fault(
            "unknown annotation",
            f"{sample.key}: its PNG has segments {others[:SHOWN]}, which segments_info does not list: they would count "
            "as void; list them, or paint them 0",
        )


def _untargeted(sample: Sample) -> Iterator[Fault]:
    """A picture of ReasonSeg without a pixel of a target: every question there has one."""
    if not all(phrase.instances for phrase in sample.phrases):
        yield Fault(
            "mask empty",
            f"{sample.key}: no pixel of a target is left outside what is ignored; draw a polygon of it, or drop it",
        )


def _counts(id_map: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Number of pixels of each id."""
    values, counts = np.unique(id_map, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return np.array([found.get(i, 0) for i in ids])


def _leaks(reports: Sequence[Report]) -> Iterator[Fault]:
    training = [r for r in reports if r.split.startswith("train")]
    for held in [r for r in reports if not r.split.startswith("train")]:
        for train in training:
            shared = sorted(set(held.pictures) & set(train.pictures))
            if shared:
                pairs = ", ".join(f"{held.pictures[p]} = {train.pictures[p]}" for p in shared[:SHOWN])
                more = f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
                yield Fault(
                    "leak",
                    f"{train.recipe} trains on {len(shared)} pictures of {held.recipe} ({held.split}): {pairs}{more}; "
                    "leave them out of training, or say so beside the score",
                )
