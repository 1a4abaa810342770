"""DAVIS-style clips: JPEG frames in a folder per clip, and index PNGs of their objects in a folder of the same name."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xseg.data.sources.semantic import SUFFIXES, read_label_map
from xseg.errors import UserError
from xseg.geometry.masks import encode
from xseg.paths import data_path
from xseg.types import Categories, Instance, Masks, Sample, Size

VOID = 255


class Source:
    """One sample per annotated frame, in the order of the clips and their frames.

    ``frames``/clip/00000.jpg belongs to ``masks``/clip/00000.png, whose numbers are objects (0 = background, 255 = not
    scored): an object's ``Instance.id`` is the same in all frames of its clip, and ``Sample.kind`` is the clip.
    ``binary`` takes every number above 0 as the one object 1 (DAVIS 2016). ``clips`` keeps only those, in this order.
    Frames without a PNG are no samples.
    """

    categories: Categories | None = None

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        frames: str,
        masks: str,
        binary: bool = False,
        clips: Sequence[str] | None = None,
        name: str = "frames",
    ) -> None:
        self.prefix, self.binary = f"{name}/{split}", binary
        self.frames, self.masks = data_path(root, frames), data_path(root, masks)
        there = sorted(p.name for p in self.masks.iterdir() if p.is_dir()) if self.masks.is_dir() else []
        missing = [clip for clip in clips or [] if clip not in there]
        if missing or not there:
            raise UserError(f"{self.masks}: no folder of masks for {missing or 'any clip'}; check 'masks' and 'clips'")
        self.records = [
            (clip, path.stem) for clip in clips or there for path in sorted((self.masks / clip).glob("*.png"))
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        clip, frame = self.records[index]
        label_map = read_label_map(self.masks / clip / f"{frame}.png")
        if self.binary:
            label_map = (label_map > 0).astype(np.int32)
        size: Size = (label_map.shape[0], label_map.shape[1])
        ids = [int(i) for i in np.unique(label_map) if i not in (0, VOID)]
        candidates = [self.frames / clip / f"{frame}{suffix}" for suffix in SUFFIXES]
        void = label_map == VOID
        return Sample(
            key=f"{self.prefix}/{clip}/{frame}",
            images=(next((c for c in candidates if c.is_file()), candidates[0]),),
            size=size,
            masks=Masks(size, id_map=label_map, ids=tuple(ids)),
            instances=tuple(Instance(row, -1, id=i) for row, i in enumerate(ids)),
            image_id=f"{clip}/{frame}",
            kind=clip,
            ignore=encode(void) if void.any() else None,
        )
