"""COCO annotations: an instances JSON (polygons or RLE), or a panoptic JSON with its folder of id PNGs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xseg.data.records import Packed, field, flag, identifier, read_records, records, text, whole
from xseg.errors import UserError
from xseg.geometry.masks import area, read_id_map, rle_from_segmentation
from xseg.paths import data_path
from xseg.types import Categories, Instance, Masks, Sample, Size


class Source:
    """One sample per image, with its instances (or panoptic segments) and the category list.

    Exactly one of ``instances`` and ``panoptic_json`` is given; ``panoptic_dir`` defaults to the JSON's path without
    its suffix. With ``instances`` every image of the JSON is a sample, annotated or not; a panoptic image needs its
    record. Objects without a single pixel are left out. ``image_ids`` keeps only those images, in this order; an id
    that the JSON does not list is an error. ``name`` starts the keys: ``name/split/image id``.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        images: str,
        instances: str | None = None,
        panoptic_json: str | None = None,
        panoptic_dir: str | None = None,
        image_ids: Sequence[int | str] | None = None,
        name: str = "coco",
    ) -> None:
        if (instances is None) == (panoptic_json is None):
            raise UserError("source coco: give exactly one of the options 'instances' and 'panoptic_json'")
        folder, pattern = images.rpartition("/")[::2] if "{" in images else (images, None)
        self.prefix, self.images = f"{name}/{split}", data_path(root, folder)
        self.path = data_path(root, str(instances or panoptic_json))
        self.id_maps: Path | None = None
        if panoptic_json is not None:
            self.id_maps = data_path(root, panoptic_dir) if panoptic_dir else self.path.with_suffix("")
        data = read_records(self.path)
        self.categories: Categories | None = read_categories(data, str(self.path))
        self.index = category_index(self.categories)
        group = group_instances if self.id_maps is None else group_segments
        grouped = group(_named(data, pattern, str(self.path)), self.index, str(self.path))
        self.records: Packed[tuple[dict[str, Any], Any]] = Packed(_chosen(grouped, image_ids, str(self.path)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        image, annotations = self.records[index]
        key = f"{self.prefix}/{image['id']}"
        size = (image["height"], image["width"])
        if self.id_maps is None:
            masks, instances = read_instances(annotations, size, self.index, f"{self.path}: image {image['id']}")
        else:
            masks, instances = self._segments(annotations, size, key)
        return Sample(
            key=key,
            images=(self.images / image["file_name"],),
            size=size,
            masks=masks,
            instances=instances,
            categories=self.categories,
            image_id=image["id"],
        )

    def _segments(self, record: Mapping[str, Any], size: Size, key: str) -> tuple[Masks, tuple[Instance, ...]]:
        assert self.id_maps is not None
        path = self.id_maps / record["file_name"]
        id_map = read_id_map(path)
        if id_map.shape != size:
            raise UserError(
                f"{key}: {path} is {list(id_map.shape)} (height, width), {self.path} says {list(size)}: a panoptic "
                f"PNG has exactly its image's size; repair one of them"
            )
        segments = record["segments_info"]
        instances = tuple(
            Instance(row, self.index[s["category_id"]], s["iscrowd"], s["id"]) for row, s in enumerate(segments)
        )
        return Masks(size, id_map=id_map, ids=tuple(s["id"] for s in segments)), instances


def _named(data: Any, pattern: str | None, where: str) -> Any:
    """The file with image records named by ``pattern``, a Python format over their keys; None leaves it."""
    if pattern is None:
        return data
    try:
        images = [{**row, "file_name": pattern.format(**row)} for row in records(data, "images", where)]
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: images: {pattern!r} does not fit an image record ({error!r}); use keys of the records, for "
            "example '{id:012d}.jpg'"
        ) from error
    return {**data, "images": images}


def read_categories(data: Any, where: str) -> Categories:
    """The category list of a COCO file in its own order, names cleaned; UserError for a name that is empty or twice."""
    rows = [(row, f"{where}: categories[{i}]") for i, row in enumerate(records(data, "categories", where))]
    return Categories(
        names=distinct_names([str(field(row, "name", place)).strip() for row, place in rows], where),
        ids=tuple(whole(row, "id", place) for row, place in rows),
        is_thing=tuple(flag(row, "isthing", place, True) for row, place in rows),
    )


def distinct_names(written: list[str], where: str) -> tuple[str, ...]:
    """Return the names cleaned, or all of them as written where cleaning would make two of them one, or one empty.

    A comma before synonyms and a panoptic suffix are customs of the public sets, in which no two names meet. A file
    where they do ("screw, M4" and "screw, M5") has other customs: there the difference is a class that its owner wants
    told apart, and cleaning the rest of the list by half would only make its names uneven.
    """
    cleaned = [clean_name(name) for name in written]
    names = cleaned if len(set(cleaned)) == len(cleaned) and all(cleaned) else written
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name:
            raise UserError(
                f"{where}: categories[{number}]: name: '' is empty: a class is asked for by its name; name it"
            )
        if first.setdefault(name, number) != number:
            raise UserError(
                f"{where}: categories[{first[name]}] and categories[{number}] are both named {name!r}: classes are "
                "told apart by their names; rename one, or give its annotations the other's category_id and take it out"
            )
    return tuple(names)


def clean_name(name: str) -> str:
    """A category name as the language model reads it: first synonym, no panoptic suffixes, spaces, lower case."""
    name = name.split(",")[0].strip()
    for suffix in ("-merged", "-other", "-stuff"):
        name = name.replace(suffix, "")
    return name.replace("-", " ").replace("_", " ").lower()


def category_index(categories: Categories) -> dict[int, int]:
    """Category id of the data set -> contiguous index."""
    return {category: i for i, category in enumerate(categories.ids)}


def read_images(data: Any, where: str) -> dict[Any, dict[str, Any]]:
    """The image records by id, with only what a sample needs."""
    slim: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(records(data, "images", where)):
        place = f"{where}: images[{number}]"
        key, name = identifier(row, "id", place), text(row, "file_name", place)
        sides = {side: whole(row, side, place, least=1) for side in ("height", "width")}
        slim[key] = {"id": key, "file_name": name, **sides}
    return slim


def slim_annotation(row: Any, index: Mapping[int, int], where: str) -> dict[str, Any]:
    """What a sample needs of an instance annotation; UserError for a category that is not in the list."""
    place = f"{where}: annotation {identifier(row, 'id', where)}"
    check_category(field(row, "category_id", place), index, place)
    slim = {k: field(row, k, place) for k in ("id", "category_id", "segmentation")}
    return {**slim, "iscrowd": flag(row, "iscrowd", place)}


def check_category(category: Any, index: Mapping[int, int], where: str) -> None:
    """UserError when a category id is not in the file's own list."""
    if not isinstance(category, int | float | str) or category not in index:
        raise UserError(
            f"{where}: category_id {category!r} is not among the {len(index)} ids of 'categories': every annotation "
            f"needs a listed category; add the category or correct the id"
        )


def _chosen(
    grouped: Iterable[tuple[dict[str, Any], Any]], image_ids: Sequence[int | str] | None, where: str
) -> Iterable[tuple[dict[str, Any], Any]]:
    """The records of ``image_ids``, in that order; all of them when it is None."""
    if image_ids is None:
        return grouped
    by_id = {record[0]["id"]: record for record in grouped}
    missing = [i for i in image_ids if i not in by_id]
    if missing:
        raise UserError(f"{where}: image_ids: {missing} not among its {len(by_id)} images; correct the recipe's list")
    return [by_id[i] for i in image_ids]


def group_instances(data: Any, index: Mapping[int, int], where: str) -> list[tuple[dict[str, Any], list[Any]]]:
    """(image, its annotations) for every image of an instances file."""
    images = read_images(data, where)
    by_image: dict[Any, list[Any]] = {image: [] for image in images}
    for number, row in enumerate(records(data, "annotations", where)):
        image = identifier(row, "image_id", place := _place(row, number, where))
        if image not in by_image:
            raise UserError(f"{place}: image_id {image!r} is not listed under 'images'")
        by_image[image].append(slim_annotation(row, index, f"{where}: image {image}"))
    return [(images[image], rows) for image, rows in by_image.items()]


def _place(row: Any, number: int, where: str) -> str:
    """How an annotation is named in a message: by its id, or by its place in the file when it has none."""
    named = isinstance(row, Mapping) and "id" in row
    return f"{where}: annotation {row['id']}" if named else f"{where}: annotations[{number}]"


def group_segments(data: Any, index: Mapping[int, int], where: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(image, its panoptic record) for every record of a panoptic file."""
    images = read_images(data, where)
    out = []
    for number, row in enumerate(records(data, "annotations", where)):
        image = identifier(row, "image_id", f"{where}: annotations[{number}]")
        place = f"{where}: image {image}"
        if image not in images:
            raise UserError(f"{place}: a panoptic record of an image that is not listed under 'images'")
        segments = []
        for k, segment in enumerate(records(row, "segments_info", place)):
            key = whole(segment, "id", f"{place} segments_info[{k}]")
            told = f"{place} annotation {key}"
            check_category(field(segment, "category_id", told), index, told)
            crowd = flag(segment, "iscrowd", told)
            segments.append({"id": key, "category_id": segment["category_id"], "iscrowd": crowd})
        out.append((images[image], {"file_name": text(row, "file_name", place), "segments_info": segments}))
    return out


def read_instances(
    annotations: list[dict[str, Any]], size: Size, index: Mapping[int, int], where: str
) -> tuple[Masks, tuple[Instance, ...]]:
    """Masks and instances of one image, without the objects that have no pixel."""
    rles = [(a, rle_from_segmentation(a["segmentation"], size, f"{where} annotation {a['id']}")) for a in annotations]
    kept = [(a, rle) for a, rle in rles if area(rle)]
    instances = tuple(Instance(row, index[a["category_id"]], a["iscrowd"], a["id"]) for row, (a, _) in enumerate(kept))
    return Masks(size, tuple(rle for _, rle in kept)), instances
