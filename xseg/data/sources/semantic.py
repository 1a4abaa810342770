"""Label maps: a folder of pictures and one of PNGs with a class number per pixel (ADE20K, Cityscapes, LoveDA, …)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from xseg.data.sources.coco import distinct_names
from xseg.errors import UserError
from xseg.paths import data_path
from xseg.types import Categories, Instance, Masks, Sample, Size

SUFFIXES = (".jpg", ".jpeg", ".png")


class Source:
    """One sample per label map, a segment per class that occurs in it.

    ``labels`` is the folder of label maps, searched with its subfolders. ``suffixes`` are the ends of the picture's and
    of the label map's name: ``images/a/b_x.png`` and ``labels/a/b_y.png`` have ["_x.png", "_y.png"]; "" for the picture
    is any type of image. ``names`` lists the classes in the
    order of their numbers, or is a text file: one name a line, or ADE20K's objectInfo150.txt (tab-separated, the name
    last). ``first`` is the number of the first class; pixels of any other number belong to none of them (1 for
    ADE20K, where 0 is "other"). The key's last part is the path without its suffix.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        images: str,
        labels: str,
        names: str | Sequence[str],
        first: int = 0,
        suffixes: Sequence[str] = ("", ".png"),
        name: str = "semantic",
    ) -> None:
        if isinstance(suffixes, str) or len(suffixes) != 2:
            raise UserError(f"source semantic: suffixes: {suffixes!r} must be two, of the picture and of the label map")
        self.prefix, self.first = f"{name}/{split}", first
        self.image_suffix, label_suffix = suffixes
        self.images, self.labels = data_path(root, images), data_path(root, labels)
        listed = _read_names(data_path(root, names)) if isinstance(names, str) else [str(n) for n in names]
        count = len(listed)
        told = names if isinstance(names, str) else f"{name}: names"
        self.categories: Categories | None = Categories(
            distinct_names(listed, told), tuple(range(first, first + count)), (False,) * count
        )
        paths = sorted(p for p in self.labels.rglob(f"*{label_suffix}") if p.is_file())
        if not paths:
            raise UserError(f"{self.labels}: no *{label_suffix} there; check the options 'labels' and 'suffixes'")
        self.records = [(p, p.relative_to(self.labels).as_posix()[: -len(label_suffix)]) for p in paths]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        path, place = self.records[index]
        label_map = read_label_map(path)
        assert self.categories is not None
        there = set(np.unique(label_map).tolist())
        found = [c for c in self.categories.ids if c in there]
        size: Size = (label_map.shape[0], label_map.shape[1])
        return Sample(
            key=f"{self.prefix}/{place}",
            images=(self._picture(place),),
            size=size,
            masks=Masks(size, id_map=label_map, ids=tuple(found)),
            instances=tuple(Instance(row, c - self.first, id=c) for row, c in enumerate(found)),
            categories=self.categories,
            image_id=place,
        )

    def _picture(self, place: str) -> Path:
        if self.image_suffix:
            return self.images / f"{place}{self.image_suffix}"
        candidates = [self.images / f"{place}{suffix}" for suffix in SUFFIXES]
        return next((c for c in candidates if c.is_file()), candidates[0])


def read_label_map(path: Path) -> np.ndarray:
    """Read a PNG of one channel (8 or 16 bit, or a palette's indices) as (H, W) int32.

    Raises UserError for a missing file and for a colour picture.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
                raise UserError(
                    f"{path}: a label map has one channel with the number of a class or object, this one has mode "
                    f"{image.mode}; convert it to a grey or palette PNG"
                )
            return np.asarray(image).astype(np.int32)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such label map; check the recipe's folders") from error
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: the label map cannot be read ({error}); fetch it again") from error


def _read_names(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of names cannot be read ({error}); check the option 'names'") from error
    if lines and lines[0].startswith("Idx\t"):
        lines = lines[1:]
    if not lines:
        raise UserError(f"{path}: no name there: one a line, in the order of the class numbers")
    return [line.split("\t")[-1].strip() for line in lines]
