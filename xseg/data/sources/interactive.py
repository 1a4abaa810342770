"""COCO-interactive in PSALM's layout: one object at a time, with a point, a scribble, a box and a rough mask."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xseg.data.records import Packed, field, records, whole
from xseg.data.sources.vgd import polygons, read_list, read_objects
from xseg.errors import UserError
from xseg.geometry.masks import area, decode, encode, rle_from_segmentation
from xseg.geometry.prompts import KINDS, RADIUS, widen
from xseg.paths import data_path
from xseg.types import Categories, Sample, Size


class Source:
    """One sample per object of the list ``json``: the object and the prompts drawn for it.

    A record is {image, image_info: {height, width}, anns: [COCO annotation with point_visual_prompt_mask,
    scribble_…, box_…, mask_visual_prompt_mask: RLE]}; ``xseg data build-interactive`` writes such files. Points and
    scribbles are stored thin and widened here to radius 10 and 5, the protocol X-SAM reports. Crowds are left out.
    The annotations have category ids, but the task asks for no name: samples have no categories.
    """

    categories: Categories | None = None

    def __init__(self, root: Path, split: str, *, json: str, images: str, name: str = "interactive") -> None:
        self.prefix, self.images, self.path = f"{name}/{split}", data_path(root, images), data_path(root, json)
        self.pictures = Packed(read_list(self.path))
        self.objects = [
            (number, row)
            for number, record in enumerate(self.pictures)
            for row, annotation in enumerate(records(record, "anns", f"{self.path}: record {number}"))
            if not (isinstance(annotation, dict) and annotation.get("iscrowd", 0))
        ]

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Sample:
        number, row = self.objects[index]
        record, where = self.pictures[number], f"{self.path}: record {number}"
        info = field(record, "image_info", where)
        size = whole(info, "height", where), whole(info, "width", where)
        masks, instances = read_objects([record["anns"][row]], size, {}, where, _prompts)
        file = str(field(record, "image", where))
        key = record["anns"][row].get("id", row)
        if not instances:
            raise UserError(f"{where} annotation {key}: the object has no pixel; take it out, or repair its mask")
        return Sample(
            key=f"{self.prefix}/{Path(file).stem}-{key}",
            images=(self.images / file,),
            size=size,
            masks=masks,
            instances=instances,
            image_id=info.get("id", Path(file).stem),
        )

    def outlines(self, index: int) -> Iterator[tuple[str, Any]]:
        """(place, [x1, y1, x2, y2, …]) of every polygon as annotated."""
        number, row = self.objects[index]
        return polygons([self.pictures[number]["anns"][row]], f"{self.path}: record {number}")


def _prompts(row: Any, size: Size, where: str) -> dict[str, dict[str, Any]]:
    out = {}
    for kind in KINDS:
        given = row.get(f"{kind}_visual_prompt_mask")
        if given:
            rle = rle_from_segmentation(given, size, f"{where} {kind}_visual_prompt_mask")
            if area(rle):
                out[kind] = encode(widen(kind, decode(rle))) if kind in RADIUS else rle
    return out
