"""ShapeWorld for the tasks beyond the first three: more annotation files for the pictures that ``write`` made.

``write_tasks`` puts a folder into a split folder::

    tasks/reason.jsonl        xseg's own format: riddles, in training all of a picture in one line, else one each.
                              (ReasonSeg's polygons know no holes, and its pictures have one mask each.)
    tasks/gcg.json            GranDf's layout: captions, their spans, a mask per thing and ground
    tasks/vgd.json            COCO-VGD: every thing with a point, a scribble, a box and a rough mask
    tasks/interactive.jsonl   xseg's own format: the same prompts, strokes and polygons too, in training all things of a
                              picture in one line, else one each. (The widths of PSALM's are those for photographs.)
    tasks/shapeworld.json     what the folder was made from

``write_all`` does so for train and val, and adds the split val_open, whose pictures all hold a shape that no training
split knows, and clips.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from xseg.data.parallel import ordered
from xseg.data.records import read_records
from xseg.data.shapeworld.board import place_of
from xseg.data.shapeworld.clips import write_clips
from xseg.data.shapeworld.grounded import grounded, record
from xseg.data.shapeworld.pointing import point_at
from xseg.data.shapeworld.reasoning import riddles
from xseg.data.shapeworld.world import SPLITS, Scene, Variant, split_scene
from xseg.data.shapeworld.write import MARKER, Progress, annotation_id, categories, coco_segment, whole_folder, write
from xseg.errors import UserError
from xseg.geometry.masks import encode, to_json
from xseg.geometry.prompts import KINDS

FORMAT = 4
"""Raised when the same arguments give other files than before."""
RIDDLES = 3
"""Most riddles a picture."""
EVALUATED, CLIPS = 100, 4
"""Most pictures of val and of val_open, and the number of clips."""
LISTS = {"reason.jsonl": False, "gcg.json": True, "vgd.json": True, "interactive.jsonl": False}
"""File -> whether it is one JSON list; else a JSONL."""
Report = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


def write_all(out: Path, images: int, *, workers: int = 1, progress: Report = lambda *_: None) -> None:
    """Add every task to the ShapeWorld in ``out``: files for the first ``images`` pictures of train and the first
    ``EVALUATED`` of val, the split val_open and the clips. The result does not depend on ``workers``.

    Raises UserError when ``out`` holds no ShapeWorld, and where something else stands in the way.
    """
    for split, most in (("train", images), ("val", EVALUATED)):
        write_tasks(out / split, most, workers=workers, progress=_of(progress, f"{split} tasks"))
    made = read_marker(out / "val")
    looks: tuple[int, Variant] = (made["size"], made["variant"])
    count = min(EVALUATED, made["images"])
    open_ = _of(progress, "val_open")
    write(
        out / "val_open", count, made["seed"], size=looks[0], variant=looks[1], split="val_open", workers=workers,
        progress=open_,
    )  # fmt: skip
    clips = _of(progress, "clips")
    write_clips(out / "clips", CLIPS, made["seed"], size=looks[0], variant=looks[1], workers=workers, progress=clips)


def _of(progress: Report, what: str) -> Progress:
    return lambda done, total: progress(what, done, total)


def read_marker(folder: Path) -> dict[str, Any]:
    """Return what a split folder was made from; UserError where it is no folder of ShapeWorld."""
    if not (folder / MARKER).is_file():
        raise UserError(f"{folder}: holds no ShapeWorld ({MARKER} is missing); write it with `xseg data shapes`")
    return read_records(folder / MARKER)  # type: ignore[no-any-return]


def write_tasks(folder: Path, images: int, *, workers: int = 1, progress: Progress | None = None) -> None:
    """Add ``folder``/tasks, for the first ``images`` pictures of a split folder, or all where it has fewer.

    The folder appears whole or not at all; the same arguments give the same bytes, however many processes work. Raises
    UserError when ``folder`` holds no ShapeWorld, and when its tasks were made for other pictures.
    """
    if images < 1:
        raise UserError(f"{folder}: tasks for {images} pictures: at least 1")
    made = read_marker(folder)
    count = min(images, made["images"])
    job = _Job(made["split"], made["seed"], made["size"], made["variant"])

    def fill(partial: Path) -> None:
        with ExitStack() as stack:
            files = {name: stack.enter_context((partial / name).open("w", encoding="utf8")) for name in LISTS}
            written = dict.fromkeys(LISTS, 0)
            for done, rows in enumerate(ordered(job, count, workers), start=1):
                for name, texts in rows.items():
                    written[name] = _append(files[name], texts, LISTS[name], written[name])
                if progress is not None:
                    progress(done, count)
            for name in (name for name, is_list in LISTS.items() if is_list):
                files[name].write("]\n" if written[name] else "[]\n")

    whole_folder(folder / "tasks", {**made, "format": FORMAT, "images": count, "pictures": made["format"]}, fill)


def _append(file: IO[str], texts: Sequence[str], is_list: bool, before: int) -> int:
    for text in texts:
        file.write((",\n" if before else "[") + text if is_list else text + "\n")
        before += 1
    return before


@dataclass(frozen=True)
class _Job:
    """The records of a picture, by file."""

    split: str
    seed: int
    size: int
    variant: Variant

    def __call__(self, index: int) -> dict[str, list[str]]:
        scene = split_scene(self.seed, self.split, index, side=self.size, variant=self.variant)
        number = index + 1
        file = f"{number:012d}.png"
        # a stream for each task: what is drawn for one does not move when another one changes
        rngs = [np.random.default_rng([self.seed, SPLITS[self.split][0] + index, k]) for k in (2, 3, 4)]
        pointed = [point_at(scene, thing, rngs[2]) for thing in range(len(scene.things))]
        prompts = [{kind: to_json(encode(drawn)) for kind, drawn in kinds.items()} for kinds in pointed]
        rows = {
            "reason.jsonl": self._riddles(scene, number, rngs[0]),
            "gcg.json": [record(file, number, *grounded(scene, rngs[1]))],
            "vgd.json": [self._vgd(scene, number, prompts)],
            "interactive.jsonl": self._interactive(scene, number, prompts),
        }
        return {name: [json.dumps(row, separators=(",", ":")) for row in found] for name, found in rows.items()}

    def _riddles(self, scene: Scene, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        phrases = []
        for riddle in riddles(scene, rng, RIDDLES):
            told = f"{riddle.explanation} {place_of(scene, [riddle.thing])}."
            phrase: dict[str, Any] = {"text": riddle.text, "objects": [riddle.thing], "explanation": told}
            phrases.append({**phrase, "kind": "long" if riddle.is_sentence else "short"})
        return self._lines(scene, number, "phrases", [[p] for p in phrases], [phrases] if phrases else [])

    def _interactive(self, scene: Scene, number: int, prompts: list[Any]) -> list[dict[str, Any]]:
        told = [{"prompts": p, "explanation": f"{place_of(scene, [i])}."} for i, p in enumerate(prompts)]
        objects = [{**o, **t} for o, t in zip(_objects(scene), told, strict=True)]
        return self._lines(scene, number, "objects", [[o] for o in objects], [objects])

    def _lines(
        self, scene: Scene, number: int, key: str, apart: list[Any], together: list[Any]
    ) -> list[dict[str, Any]]:
        """One line a picture in training, where it is encoded once for all; else each by itself, which scores."""
        train = self.split == "train"
        head = {"image": f"{number:012d}.png", "size": [scene.side, scene.side], "objects": _objects(scene)}
        return [
            {"id": f"{number}" if train else f"{number}-{part}", **head, key: found}
            for part, found in enumerate(together if train else apart)
        ]

    def _vgd(self, scene: Scene, number: int, prompts: list[Any]) -> dict[str, Any]:
        ids = {c["name"]: c["id"] for c in categories(SPLITS[self.split][1])}
        size = {"height": scene.side, "width": scene.side}
        file = f"{number:012d}.png"
        annotations = []
        for thing, look in enumerate(scene.things):
            mask = scene.visible(thing)
            drawn = {f"{kind}_visual_prompt": prompts[thing][kind] for kind in KINDS}
            key = annotation_id(number, thing)
            known = {"id": key, "image_id": number, "segmentation": to_json(encode(mask)), "visual_prompts": drawn}
            annotations.append({**coco_segment(mask, ids[look.shape], key), **known})
        return {
            "image_file": file,
            "image_id": number,
            "image_size": [scene.side, scene.side],
            "image_info": {"id": number, "file_name": file, **size},
            "annotations": annotations,
        }


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [{"segmentation": to_json(encode(scene.visible(i))), "id": i + 1} for i in range(len(scene.things))]
