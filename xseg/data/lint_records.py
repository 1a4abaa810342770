"""The part of lint that reads annotation files record by record, for formats whose reader stops at the first fault."""

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xseg.config import DataRecipe, data_path
from xseg.data.records import field, read_records, records
from xseg.data.sources import llava
from xseg.errors import UserError
from xseg.geometry.masks import area, rle_from_segmentation
from xseg.tokens import IMAGE
from xseg.types import Size

SLACK = 2.0
"""Pixels by which an outline may leave its picture: annotation tools do that along the edge."""


class Fault(NamedTuple):
    """One thing that is wrong."""

    kind: str
    """Short and countable, such as "mask empty"."""
    text: str
    """File and record, what is wrong, and what to do."""


def check(recipe: DataRecipe, root: Path) -> list[Fault]:
    """Every fault in the annotation files of a recipe, as far as its format has a check; UserError for a lost file."""
    checker = CHECKS.get(recipe.source)
    return [] if checker is None else list(checker(recipe.options, root))


def pictures(recipe: DataRecipe, root: Path) -> list[tuple[Path, Size, str]]:
    """(file, stated (H, W), place) of the pictures that the COCO file of a recipe lists; [] for other formats."""
    named = recipe.options.get("instances") or recipe.options.get("panoptic_json")
    folder = recipe.options.get("images")
    if named is None or folder is None or "{" in folder:
        return []
    path = data_path(root, str(named))
    rows = enumerate(records(read_records(path), "images", str(path)))
    return [
        (data_path(root, folder) / row["file_name"], (int(row["height"]), int(row["width"])), f"{path}: images[{n}]")
        for n, row in rows
        if not {"file_name", "height", "width"} - set(row)
    ]


def outside(polygon: Any, size: Size, where: str) -> Iterator[Fault]:
    """Yield the fault of an outline [x1, y1, …] that leaves its picture of (H, W) pixels by more than ``SLACK``."""
    try:
        values = np.asarray(polygon, np.float64)
    except (TypeError, ValueError):
        return  # the reader names malformed polygons itself
    if values.ndim != 1 or len(values) % 2:
        return
    xy = values.reshape(-1, 2)
    if len(xy) and ((xy < -SLACK).any() or (xy > np.array(size[::-1]) + SLACK).any()):
        low, high = np.round(xy.min(0), 1).tolist(), np.round(xy.max(0), 1).tolist()
        yield Fault(
            "polygon outside",
            f"{where}: a polygon reaches from {low} to {high} (x, y) in a picture of {size[1]} x {size[0]} (width, "
            "height): outlines lie inside; repair it, or the picture's size",
        )


def _coco(options: Mapping[str, Any], root: Path) -> Iterator[Fault]:
    """An instances or panoptic JSON."""
    path = data_path(root, str(options.get("instances") or options.get("panoptic_json")))
    yield from _coco_file(path)


def _coco_file(path: Path) -> Iterator[Fault]:
    data, where = read_records(path), str(path)
    categories = {row.get("id") for row in records(data, "categories", where) if isinstance(row, Mapping)}
    yield from _repeated(records(data, "categories", where), "id", f"{where}: categories")
    images = {}
    rows = records(data, "images", where)
    yield from _repeated(rows, "id", f"{where}: images")
    yield from _repeated(rows, "file_name", f"{where}: images")
    for number, row in enumerate(rows):
        place = f"{where}: images[{number}]"
        missing = [k for k in ("id", "file_name", "height", "width") if not isinstance(row, Mapping) or k not in row]
        if missing:
            yield Fault("record", f"{place}: key '{missing[0]}' is missing; every image needs it")
        else:
            images[row["id"]] = (int(row["height"]), int(row["width"]))
    rows = records(data, "annotations", where)
    yield from _repeated(rows, "id", f"{where}: annotations")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            yield Fault("record", f"{where}: annotations[{number}]: expected a record, found {str(row)[:60]!r}")
            continue
        place = f"{where}: annotations[{number}] (id {row.get('id', row.get('image_id'))})"
        if not _among(row.get("image_id"), images):
            yield Fault("unknown image", f"{place}: image_id {row.get('image_id')!r} is not listed under 'images'")
        for segment in row.get("segments_info", [row]):
            if not _among(segment.get("category_id"), categories):
                yield Fault("unknown category", f"{place}: category_id {segment.get('category_id')!r} is not listed")
        if "segments_info" not in row and _among(row.get("image_id"), images):
            yield from _segmentation(row, images[row["image_id"]], place)


def _segmentation(row: Mapping[str, Any], size: Size, place: str) -> Iterator[Fault]:
    try:
        rle = rle_from_segmentation(field(row, "segmentation", place), size, place)
    except UserError as error:
        yield Fault("mask damaged", str(error))
        return
    if not area(rle):
        yield Fault("mask empty", f"{place}: its mask has no pixel; take it out or draw it")
    if isinstance(row["segmentation"], list):
        for polygon in row["segmentation"]:
            yield from outside(polygon, size, place)


def _refer(options: Mapping[str, Any], root: Path) -> Iterator[Fault]:
    """References and the instances file they point into."""
    if "instances" not in options or "refs" not in options:
        return  # the source itself says which option is missing
    instances, path = data_path(root, str(options["instances"])), data_path(root, str(options["refs"]))
    yield from _coco_file(instances)
    data, where = read_records(instances), str(path)
    images = {row.get("id") for row in records(data, "images", str(instances)) if isinstance(row, Mapping)}
    rows = [row for row in records(data, "annotations", str(instances)) if isinstance(row, Mapping)]
    owner = {row.get("id"): row.get("image_id") for row in rows}
    refs = read_records(path)
    if not isinstance(refs, list):
        yield Fault("record", f"{where}: expected a list of references, found a {type(refs).__name__}")
        return
    yield from _repeated(refs, "ref_id", where)
    spoken = [s for ref in refs if isinstance(ref, Mapping) for s in ref.get("sentences", [])]
    yield from _repeated(spoken, "sent_id", f"{where}: sentences")
    for number, ref in enumerate(refs):
        if not isinstance(ref, Mapping):
            yield Fault("record", f"{where}: [{number}]: expected a record, found {str(ref)[:60]!r}")
            continue
        place = f"{where}: [{number}] (ref_id {ref.get('ref_id')})"
        if not _among(ref.get("image_id"), images):
            yield Fault("unknown image", f"{place}: image_id {ref.get('image_id')!r} is not listed in {instances}")
        named = ref.get("ann_id", -1)
        for annotation in named if isinstance(named, list) else [named]:
            if annotation != -1 and not _among(annotation, owner):
                yield Fault("unknown annotation", f"{place}: ann_id {annotation!r} is not in {instances}")
            elif annotation != -1 and owner[annotation] != ref.get("image_id"):
                yield Fault(
                    "annotation of another image", f"{place}: ann_id {annotation!r} lies on image {owner[annotation]!r}"
                )
        sentences = ref.get("sentences", [])
        if not sentences or not all(str(s.get("sent", "")).strip() for s in sentences):
            yield Fault("text empty", f"{place}: a reference without a sentence, or an empty one; write it or drop it")


def _llava(options: Mapping[str, Any], root: Path) -> Iterator[Fault]:
    """Conversations."""
    path = data_path(root, str(options.get("json")))
    rows = read_records(path)
    if not isinstance(rows, list):
        return  # the source itself says so
    for number, row in enumerate(rows):
        try:
            record = llava.read_record(row, f"{path}: conversation {number}")
            for turn, (_, text) in enumerate(record["turns"]):
                if not text.replace(IMAGE, "").strip():
                    yield Fault(
                        "text empty", f"{path}: conversation {number}: turn {turn} has no words; write or drop it"
                    )
        except UserError as error:
            yield Fault("conversation", str(error))


def _among(value: Any, known: Container[Any]) -> bool:
    """Whether an id is known; a list or an object is no id."""
    return isinstance(value, int | str) and value in known


def _repeated(rows: list[Any], key: str, where: str) -> Iterator[Fault]:
    seen: set[str] = set()
    for number, row in enumerate(rows):
        value = row.get(key) if isinstance(row, Mapping) else None
        if value is not None and repr(value) in seen:
            yield Fault("duplicate id", f"{where}[{number}]: {key} {value!r} is there twice; make it unique")
        seen.add(repr(value))


CHECKS: dict[str, Callable[[Mapping[str, Any], Path], Iterator[Fault]]] = {
    "coco": _coco,
    "refer": _refer,
    "llava": _llava,
}
