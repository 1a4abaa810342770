"""The part of lint that reads annotation files record by record, for formats whose reader stops at the first fault."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xseg.config import DataRecipe
from xseg.data.records import field, read_records, records, whole
from xseg.data.sources import llava
from xseg.errors import UserError
from xseg.geometry.masks import area, rle_from_segmentation
from xseg.paths import data_path
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
    about: str = ""
    """What it is about where several records may say the same, such as a picture's file; told once."""


def check(recipe: DataRecipe, root: Path) -> list[Fault]:
    """Every fault in the annotation files of a recipe, as far as its format has a check."""
    found: list[Fault] = []
    try:
        checker = CHECKS.get(recipe.source)
        for fault in () if checker is None else checker(recipe.options, root):
            found.append(fault)  # one by one: an error further on must not lose the faults before it
    except UserError as error:
        found.append(Fault("record", str(error)))
    return found


def pictures(recipe: DataRecipe, root: Path) -> list[tuple[Path, Size, str]]:
    """(file, stated (H, W), place) of the pictures that the COCO file of a recipe lists; [] for other formats."""
    named = recipe.options.get("instances") or recipe.options.get("panoptic_json")
    folder = recipe.options.get("images")
    if named is None or not isinstance(folder, str) or "{" in folder:
        return []
    path = data_path(root, str(named))
    try:
        rows = enumerate(records(read_records(path), "images", str(path)))
    except UserError:
        return []  # ``check`` has said it
    return [
        (data_path(root, folder) / str(row["file_name"]), (row["height"], row["width"]), f"{path}: images[{n}]")
        for n, row in rows
        if isinstance(row, Mapping) and not {"file_name", "height", "width"} - set(row)
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
    named = options.get("instances") or options.get("panoptic_json")
    if named is not None:  # the source itself says which option is missing, and what was written in its place
        yield from _coco_file(data_path(root, str(named)))


def _coco_file(path: Path) -> Iterator[Fault]:
    data, where = read_records(path), str(path)
    categories = _by_id(records(data, "categories", where))
    yield from _repeated(records(data, "categories", where), "id", f"{where}: categories")
    images: dict[str, Size] = {}
    rows = records(data, "images", where)
    yield from _repeated(rows, "id", f"{where}: images")
    yield from _repeated(rows, "file_name", f"{where}: images")
    for number, row in enumerate(rows):
        place = f"{where}: images[{number}]"
        try:
            field(row, "file_name", place)
            images[str(field(row, "id", place))] = (whole(row, "height", place), whole(row, "width", place))
        except UserError as error:
            yield Fault("record", str(error))
    rows = records(data, "annotations", where)
    yield from _repeated(rows, "id", f"{where}: annotations")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            yield Fault("record", f"{where}: annotations[{number}]: expected a record, found {str(row)[:60]!r}")
            continue
        place = f"{where}: annotations[{number}] (id {row.get('id', row.get('image_id'))})"
        for segment in _listed(row, "segments_info") if "segments_info" in row else [row]:
            if not isinstance(segment, Mapping):
                yield Fault("record", f"{place}: segments_info: expected a record, found {str(segment)[:60]!r}")
            elif str(segment.get("category_id")) not in categories:
                yield Fault("unknown category", f"{place}: category_id {segment.get('category_id')!r} is not listed")
        size = images.get(str(row.get("image_id")))
        if size is None:
            yield Fault("unknown image", f"{place}: image_id {row.get('image_id')!r} is not listed under 'images'")
        elif "segments_info" not in row:
            yield from _segmentation(row, size, place)


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
    images = _by_id(records(data, "images", str(instances)))
    owner = _by_id(records(data, "annotations", str(instances)))
    refs = read_records(path)
    if not isinstance(refs, list):
        yield Fault("record", f"{where}: expected a list of references, found a {type(refs).__name__}")
        return
    yield from _repeated(refs, "ref_id", where)
    spoken = [s for ref in refs if isinstance(ref, Mapping) for s in _listed(ref, "sentences")]
    yield from _repeated(spoken, "sent_id", f"{where}: sentences")
    for number, ref in enumerate(refs):
        if not isinstance(ref, Mapping):
            yield Fault("record", f"{where}: [{number}]: expected a record, found {str(ref)[:60]!r}")
            continue
        place = f"{where}: [{number}] (ref_id {ref.get('ref_id')})"
        if str(ref.get("image_id")) not in images:
            yield Fault("unknown image", f"{place}: image_id {ref.get('image_id')!r} is not listed in {instances}")
        named = ref.get("ann_id", -1)
        for annotation in named if isinstance(named, list) else [named]:
            if annotation == -1:
                continue
            if str(annotation) not in owner:
                yield Fault("unknown annotation", f"{place}: ann_id {annotation!r} is not in {instances}")
            elif owner[str(annotation)].get("image_id") != ref.get("image_id"):
                other = owner[str(annotation)].get("image_id")
                yield Fault("annotation of another image", f"{place}: ann_id {annotation!r} lies on image {other!r}")
        sentences = _listed(ref, "sentences")
        if not sentences or not all(isinstance(s, Mapping) and str(s.get("sent", "")).strip() for s in sentences):
            yield Fault("text empty", f"{place}: a reference without a sentence, or an empty one; write it or drop it")


def _llava(options: Mapping[str, Any], root: Path) -> Iterator[Fault]:
    """Conversations."""
    if "json" not in options:
        return  # the source itself says so
    path = data_path(root, str(options["json"]))
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


def _by_id(rows: list[Any]) -> dict[str, Mapping[str, Any]]:
    """Records by their id as text, which even a wrong id has."""
    return {str(row.get("id")): row for row in rows if isinstance(row, Mapping)}


def _listed(row: Mapping[str, Any], key: str) -> list[Any]:
    """The list at ``key``; what is none, the source itself names."""
    return row[key] if isinstance(row.get(key), list) else []


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
