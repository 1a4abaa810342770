"""Prompt annotations made of a COCO instances JSON: COCO-VGD (X-SAM, section 5.3 of the data description) and
COCO-interactive (PSALM's layout).

The prompts of an annotation depend on the seed and on its place in the file, so the same input gives the same bytes
with any number of processes.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xseg.data.parallel import ordered
from xseg.data.records import Packed, field, flag, identifier, read_records, records
from xseg.data.sources.coco import read_images
from xseg.errors import UserError
from xseg.geometry.masks import decode, encode, rle_from_segmentation, to_json
from xseg.geometry.prompts import draw, widen
from xseg.paths import make_folder

Layout = Literal["vgd", "interactive"]
Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


def build(
    layout: Layout, instances: Path, out: Path, *, seed: int = 0, workers: int = 1, progress: Progress | None = None
) -> int:
    """Write the prompt annotation file ``out`` of a COCO instances JSON; return the number of objects in it.

    Crowds, and objects without a connected part of more than 5 pixels, are left out; pictures without an object too.
    The file appears whole or not at all. Raises UserError for an ``out`` that is there, a negative seed, and for
    anything wrong in the instances, naming the record.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; nothing is overwritten: choose another name or remove it")
    if seed < 0:
        raise UserError(f"seed {seed}: a seed is 0 or more")
    pictures = Packed(_grouped(instances))
    job = _Job(layout, pictures, seed, str(instances))
    make_folder(out.parent)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    objects = 0
    try:
        with partial.open("w", encoding="utf8") as file:
            first = True
            for done, (text, count) in enumerate(ordered(job, len(pictures), workers), start=1):
                if count:
                    file.write(("[" if first else ",\n") + text)
                    first, objects = False, objects + count
                if progress is not None:
                    progress(done, len(pictures))
            file.write("[]\n" if first else "]\n")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return objects


def _grouped(path: Path) -> list[tuple[dict[str, Any], list[tuple[int, Any]]]]:
    """(image, its annotations with their places in the file) in the order of the images."""
    data, where = read_records(path), str(path)
    images = read_images(data, where)
    by_image: dict[Any, list[tuple[int, Any]]] = {image: [] for image in images}
    for number, row in enumerate(records(data, "annotations", where)):
        image = identifier(row, "image_id", f"{where}: annotations[{number}]")
        if image not in by_image:
            raise UserError(f"{where}: annotations[{number}]: image_id {image!r} is not listed under 'images'")
        by_image[image].append((number, row))
    return [(images[image], rows) for image, rows in by_image.items()]


@dataclass(frozen=True)
class _Job:
    """The record of a picture as text, and its number of objects."""

    layout: Layout
    pictures: Packed[Any]
    seed: int
    where: str

    def __call__(self, index: int) -> tuple[str, int]:
        image, annotations = self.pictures[index]
        rows = [row for number, given in annotations if (row := self._object(number, given, image)) is not None]
        info = {k: image[k] for k in ("id", "file_name", "height", "width")}
        if self.layout == "interactive":
            record = {"image": image["file_name"], "image_info": info, "anns": rows}
        else:
            record = {
                "image_file": image["file_name"],
                "image_id": image["id"],
                "image_size": [image["height"], image["width"]],
                "image_info": info,
                "annotations": rows,
            }
        return json.dumps(record, separators=(",", ":")), len(rows)

    def _object(self, number: int, annotation: Any, image: dict[str, Any]) -> dict[str, Any] | None:
        where = f"{self.where}: annotations[{number}]"
        if flag(annotation, "iscrowd", where):
            return None
        size = (image["height"], image["width"])
        mask = decode(rle_from_segmentation(field(annotation, "segmentation", where), size, where))
        drawn = draw(mask, np.random.default_rng([self.seed, number]))
        if not drawn:
            return None
        if self.layout == "interactive":
            thin = {f"{kind}_visual_prompt_mask": to_json(encode(prompt)) for kind, prompt in drawn.items()}
            return {**annotation, **thin}
        wide = {f"{kind}_visual_prompt": to_json(encode(widen(kind, prompt))) for kind, prompt in drawn.items()}
        return {**annotation, "visual_prompts": wide}
