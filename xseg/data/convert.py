"""``xseg data convert``: what people have -> xseg's JSONL (``xseg/data/sources/jsonl.py``) and a recipe for it.

Images stay where they are; the JSONL names them relative to its folder.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xseg.data.records import field, read_records, records, whole
from xseg.data.sources import Source, coco, reason
from xseg.data.sources.jsonl import to_line
from xseg.data.sources.semantic import SUFFIXES, read_label_map
from xseg.errors import UserError, did_you_mean
from xseg.geometry.masks import encode, rle_from_segmentation, union
from xseg.geometry.views import read_size
from xseg.paths import partial_folder
from xseg.types import Categories, Instance, Masks, Phrase, Sample, Size

Samples = Iterable[Sample]
JSONL, RECIPE = "samples.jsonl", "recipe.yaml"
NAMED, POINTED = "generic_seg", "interactive_seg"


def convert(layout: str, source: Path, out: Path, images: Path | None = None) -> int:
    """Write ``out``/samples.jsonl and ``out``/recipe.yaml from ``source``; return the number of samples.

    ``layout`` is one of ``LAYOUTS``; ``images`` is the folder of the pictures where they do not lie beside the
    annotations. The folder appears whole or not at all. Raises UserError for an unknown layout, an ``out`` that holds
    something, and for anything wrong in the source, naming the file and the record.
    """
    if layout not in LAYOUTS:
        raise UserError(f"{layout!r}: no such layout to convert from{did_you_mean(layout, LAYOUTS)}")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder to convert; check the path")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; nothing is overwritten: choose another folder or remove this one")
    reader, task = LAYOUTS[layout]
    partial = partial_folder(out)
    try:
        partial.chmod(0o755)
        names: dict[str, bool] = {}
        count = 0
        with (partial / JSONL).open("w", encoding="utf8") as file:
            for sample in reader(source, images):
                # relative to where the folder will stand, not to the temporary one
                file.write(to_line(sample, out.resolve()) + "\n")
                count += 1
                if sample.categories is not None:
                    names.update(zip(sample.categories.names, sample.categories.is_thing, strict=True))
        if not count:
            raise UserError(f"{source}: nothing to convert there as {layout}; check the path and the layout")
        # masks without a name can only be asked for by pointing at them
        task = POINTED if task == NAMED and not names else task
        (partial / RECIPE).write_text(_recipe(layout, task, names, count, source), encoding="utf8")
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _recipe(layout: str, task: str, names: dict[str, bool], count: int, source: Path) -> str:
    options: dict[str, Any] = {"jsonl": JSONL}
    if names:
        options["categories"] = list(names)
    stuff = [name for name, is_thing in names.items() if not is_thing]
    if stuff:
        options["stuff"] = stuff
    split = source.resolve().name if layout == "lisa" else "train"
    recipe = {"source": "jsonl", "options": options, "task": task, "split": split, "licence": "", "count": count}
    head = f"# Made from {source.name} ({layout}). Paths are relative to this folder: use it as the data root.\n"
    return head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _coco(path: Path, images: Path | None) -> Iterator[Sample]:
    """A COCO instances or panoptic JSON."""
    if images is None:
        raise UserError(f"{path}: a COCO JSON does not say where its pictures lie; name their folder: --images DIR")
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; name the one that holds the pictures of {path}: --images DIR")
    first = records(read_records(path), "annotations", str(path))[:1]
    panoptic = any(isinstance(row, Mapping) and "segments_info" in row for row in first)
    key = "panoptic_json" if panoptic else "instances"
    source = coco.Source(Path(), "train", images=str(images), **{key: str(path)}, name=path.stem)
    for index, (image, _) in enumerate(source.records):
        # before any mask is read: a height of millions would first fill the memory
        _check_size(
            source.images / image["file_name"], (image["height"], image["width"]), f"{path}: image {image['id']}"
        )
        yield source[index]


def _check_size(image: Path, stated: Size, where: str) -> None:
    """UserError when a picture is not there, or is not of the (H, W) that its annotation states."""
    size = read_size(image, where)
    if size != stated:
        turned = (
            "; the two are swapped, as when a picture was annotated the way its EXIF rotation shows it: it is read as "
            "it is stored, so store it turned, without that tag"
        )
        raise UserError(
            f"{where}: image {image} is {list(size)} (height, width), its annotation says {list(stated)}: masks only "
            "fit the picture they were drawn on; take that picture, or repair the size"
            + (turned if size == stated[::-1] else "")
        )


def _lisa(folder: Path, images: Path | None) -> Samples:
    """A split's folder of ReasonSeg: pictures and a JSON beside each; but for training, a line for each question."""
    if images is not None:
        raise UserError(f"{images}: the pictures of ReasonSeg lie beside their JSON files; leave --images out")
    name = folder.resolve().name
    return _all(reason.Source(folder.resolve().parent, name, folder="."))


def _all(source: Source) -> Samples:
    return (source[i] for i in range(len(source)))


def _labelme(folder: Path, images: Path | None) -> Iterator[Sample]:
    """A folder of labelme's JSON files; shapes with the same label and group_id are one object."""
    paths = sorted(folder.rglob("*.json"))
    read = [(path, read_records(path)) for path in paths]
    labels = sorted({str(field(s, "label", str(p))).strip() for p, d in read for s in records(d, "shapes", str(p))})
    categories = Categories(tuple(labels), tuple(range(len(labels))), (True,) * len(labels))
    for path, data in read:
        image = (images or path.parent) / Path(str(field(data, "imagePath", str(path))).replace("\\", "/")).name
        # files of old versions state no size, or null
        sides = ("imageHeight", "imageWidth")
        size = read_size(image, str(path))
        if any(data.get(side) is not None for side in sides):
            _check_size(image, (whole(data, sides[0], str(path)), whole(data, sides[1], str(path))), str(path))
        groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
        for number, shape in enumerate(records(data, "shapes", str(path))):
            place = f"{path}: shapes[{number}]"
            label = str(field(shape, "label", place)).strip()
            group = shape.get("group_id")
            rle = rle_from_segmentation([_labelme_polygon(shape, place)], size, place)
            groups.setdefault((label, number if group is None else f"group {group}"), []).append(rle)
        instances = tuple(Instance(row, labels.index(label), id=row) for row, (label, _) in enumerate(groups))
        masks = Masks(size, tuple(union(rles) for rles in groups.values()))
        key = path.relative_to(folder).with_suffix("").as_posix()
        yield Sample(key, (image,), size, masks, instances, categories)


def _labelme_polygon(shape: Any, where: str) -> list[float]:
    """The outline of a labelme shape: polygon, rectangle (two corners) or circle (centre and a point on it)."""
    kind = str(shape.get("shape_type") or "polygon")
    try:
        points = np.asarray(field(shape, "points", where), np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: points must be pairs of numbers [x, y] ({error}); repair the shape") from error
    least = {"polygon": 3, "rectangle": 2, "circle": 2}
    if kind not in least:
        raise UserError(
            f"{where}: shape_type {kind!r} has no area; only {', '.join(least)} are read: redraw or drop it"
        )
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < least[kind]:
        raise UserError(f"{where}: a {kind} needs at least {least[kind]} points [x, y]; repair the shape")
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points[:2]
        points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if kind == "circle":
        angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = points[0] + np.hypot(*(points[1] - points[0])) * np.stack([np.cos(angle), np.sin(angle)], 1)
    return points.ravel().tolist()  # type: ignore[no-any-return]


def _png_masks(folder: Path, images: Path | None) -> Iterator[Sample]:
    """``images``/X.jpg and ``masks``/category/X.png (pixels above 0) or ``masks``/X.png (every number an object)."""
    pictures, masks = images or folder / "images", folder / "masks"
    if not masks.is_dir() or not pictures.is_dir():
        missing = masks if not masks.is_dir() else pictures
        raise UserError(
            f"{missing}: no such folder; PNG masks lie in SRC/masks, pictures in SRC/images or --images DIR"
        )
    names = sorted(p.name for p in masks.iterdir() if p.is_dir())
    categories = Categories(tuple(names), tuple(range(len(names))), (True,) * len(names)) if names else None
    used: set[Path] = set()
    for image in sorted(p for p in pictures.iterdir() if p.suffix.lower() in SUFFIXES):
        size = read_size(image, str(image))
        rles: list[dict[str, Any]] = []
        instances: list[Instance] = []
        for category, place in [(-1, masks), *((i, masks / n) for i, n in enumerate(names))]:
            path = place / f"{image.stem}.png"
            if not path.is_file():
                continue
            used.add(path)
            label_map = _checked(path, size, image)
            for value in [v for v in np.unique(label_map) if v] if category < 0 else [0]:
                instances.append(Instance(len(rles), category, id=len(rles)))
                rles.append(encode(label_map == value if value else label_map > 0))
        if instances:
            yield Sample(image.stem, (image,), size, Masks(size, tuple(rles)), tuple(instances), categories)
    lost = sorted(set(masks.rglob("*.png")) - used)
    if lost:
        raise UserError(f"{lost[0]}: a mask without its picture in {pictures}; {len(lost)} such masks: add or remove")


def _checked(path: Path, size: Size, image: Path) -> np.ndarray:
    label_map = read_label_map(path)
    if label_map.shape != size:
        raise UserError(
            f"{path}: {list(label_map.shape)} (height, width), its picture {image} is {list(size)}: a mask has exactly "
            f"its picture's size; repair one of them"
        )
    return label_map


def _sa2va(path: Path, images: Path | None) -> Iterator[Sample]:
    """Sa2VA's annotations.json: [{image, mask: [polygons of each object], text: [a phrase for each]}]."""
    path = path / "annotations.json" if path.is_dir() else path
    folder = images or path.parent / "images"
    data = read_records(path)
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of {{image, mask, text}}, found a {type(data).__name__}")
    for number, row in enumerate(data):
        where = f"{path}: record {number}"
        masks, texts = records(row, "mask", where), records(row, "text", where)
        if len(masks) != len(texts):
            raise UserError(f"{where}: {len(masks)} masks and {len(texts)} texts: each mask has one text; repair it")
        image = folder / str(field(row, "image", where))
        size = read_size(image, where)
        rles = tuple(rle_from_segmentation(m, size, f"{where} mask {i}") for i, m in enumerate(masks))
        instances = tuple(Instance(i, -1, id=i) for i in range(len(rles)))
        phrases = tuple(Phrase(str(t).strip(), (i,)) for i, t in enumerate(texts))
        yield Sample(f"{number:06d}", (image,), size, Masks(size, rles), instances, phrases=phrases)


LAYOUTS: dict[str, tuple[Callable[[Path, Path | None], Samples], str]] = {
    "coco": (_coco, NAMED),
    "labelme": (_labelme, NAMED),
    "png-masks": (_png_masks, NAMED),
    "lisa": (_lisa, "reason_seg"),
    "sa2va": (_sa2va, "refer_seg"),
}
"""layout -> (its reader, the task its recipe names)."""
