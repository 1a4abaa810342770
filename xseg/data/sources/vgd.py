"""COCO-VGD (X-SAM): COCO annotations with drawn prompts, the objects of a picture that others are to be found by."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xseg.data.records import Packed, field, flag, read_records, records, whole
from xseg.data.sources.coco import category_index, check_category, read_categories
from xseg.errors import UserError
from xseg.geometry.masks import area, rle_from_segmentation
from xseg.geometry.prompts import KINDS
from xseg.paths import data_path
from xseg.types import Categories, Instance, Masks, Sample, Size

Prompts = Callable[[Any, Size, str], dict[str, dict[str, Any]]]
"""(annotation, (H, W), place) -> RLE per kind."""


class Source:
    """One sample per picture of the list ``json``, its objects with the prompts that are drawn for them.

    A record is {image_file, image_id, image_info: {height, width}, annotations: [COCO annotation with visual_prompts:
    {point_visual_prompt, scribble_…, box_…, mask_…: RLE}]}; ``xseg data build-vgd`` writes such files. ``categories``
    is the COCO file whose category list the ids belong to. Objects without a single pixel are left out, and so are
    prompts without one: a kind that is missing was not drawn.
    """

    def __init__(self, root: Path, split: str, *, json: str, images: str, categories: str, name: str = "vgd") -> None:
        self.prefix, self.images, self.path = f"{name}/{split}", data_path(root, images), data_path(root, json)
        listed = data_path(root, categories)
        self.categories: Categories | None = read_categories(read_records(listed), str(listed))
        self.index = category_index(self.categories)
        self.records = Packed(read_list(self.path))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, where = self.records[index], f"{self.path}: record {index % len(self)}"
        size = _size(record, where)
        annotations = records(record, "annotations", where)
        masks, instances = read_objects(annotations, size, self.index, where, _prompts)
        return Sample(
            key=f"{self.prefix}/{field(record, 'image_id', where)}",
            images=(self.images / str(field(record, "image_file", where)),),
            size=size,
            masks=masks,
            instances=instances,
            categories=self.categories,
            image_id=record["image_id"],
        )

    def outlines(self, index: int) -> Iterator[tuple[str, Any]]:
        """(place, [x1, y1, x2, y2, …]) of every polygon as annotated."""
        where = f"{self.path}: record {index}"
        return polygons(records(self.records[index], "annotations", where), where)


def read_list(path: Path) -> list[Any]:
    """Read a JSON list of records; UserError for anything else."""
    data = read_records(path)
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of records, one a picture, found a {type(data).__name__}")
    return data


def read_objects(
    annotations: Sequence[Any], size: Size, index: Mapping[int, int], where: str, prompts: Prompts
) -> tuple[Masks, tuple[Instance, ...]]:
    """Masks and instances with their prompts, without the objects that have no pixel; empty ``index`` = no categories.

    Raises UserError for a category outside the list and for damaged masks or prompts.
    """
    rles: list[dict[str, Any]] = []
    instances: list[Instance] = []
    for number, row in enumerate(annotations):
        place = f"{where} annotation {row.get('id', number) if isinstance(row, Mapping) else number}"
        rle = rle_from_segmentation(field(row, "segmentation", place), size, place)
        category = -1
        if index:
            check_category(field(row, "category_id", place), index, place)
            category = index[row["category_id"]]
        if not area(rle):
            continue
        crowd, key = flag(row, "iscrowd", place), whole(row, "id", place, number)
        instances.append(Instance(len(rles), category, crowd, key, prompts(row, size, place)))
        rles.append(rle)
    return Masks(size, tuple(rles)), tuple(instances)


def polygons(annotations: Sequence[Any], where: str) -> Iterator[tuple[str, Any]]:
    """(place, polygon) of COCO annotations."""
    for number, row in enumerate(annotations):
        if isinstance(row, Mapping) and isinstance(row.get("segmentation"), list):
            place = f"{where} annotation {row.get('id', number)}"
            yield from ((place, polygon) for polygon in row["segmentation"])


def _prompts(row: Any, size: Size, where: str) -> dict[str, dict[str, Any]]:
    drawn = field(row, "visual_prompts", where)
    if not isinstance(drawn, Mapping):
        raise UserError(f"{where}: visual_prompts: {str(drawn)[:60]!r} must map kinds to masks; correct it")
    out = {}
    for kind in KINDS:
        given = drawn.get(f"{kind}_visual_prompt")
        if given:
            rle = rle_from_segmentation(given, size, f"{where} {kind}_visual_prompt")
            if area(rle):
                out[kind] = rle
    return out


def _size(record: Any, where: str) -> Size:
    info = field(record, "image_info", where)
    return whole(info, "height", where), whole(info, "width", where)
