"""ShapeWorld on disk, in the formats of the real data sets.

``write`` makes one split folder::

    images/000000000001.png     RGB pictures; the number is the image id: its place in the split, from 1
    panoptic.json  panoptic/    COCO panoptic: one record per image, PNGs with id = R + 256 G + 65536 B
    instances.json              COCO instances: visible masks as compressed RLE
    refs.json                   RefCOCO's records; "ann_id" is [] where nothing is meant, a sentence has its "kind" and,
                                as "explanation", the square it means
    talk.json                   LLaVA conversations; "question_type" is that of the last question. In training
                                questions for places are among them, as in LLaVA's mixture
    captions.json               LLaVA conversations of descriptions, five an image
    shapeworld.json             what the folder was made from

A folder appears whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from xseg.data.parallel import ordered
from xseg.data.shapeworld.board import place_of
from xseg.data.shapeworld.draw import PAINT, draw
from xseg.data.shapeworld.language import descriptions, expressions
from xseg.data.shapeworld.questions import Question, places, questions
from xseg.data.shapeworld.world import GROUNDS, SPLITS, Policy, Scene, Variant, shapes_of, split_scene
from xseg.errors import UserError
from xseg.geometry.masks import encode, to_json, write_id_map
from xseg.paths import partial_folder
from xseg.tokens import IMAGE

FORMAT = 5
"""Raised when the same arguments give other files than before."""
MARKER = "shapeworld.json"
EXPRESSIONS, QUESTIONS, PLACES = 6, 6, 5
"""Most expressions an image; most questions with short answers, and for places, in a training conversation."""
VAL_QUESTIONS = 3
"""Conversations, of one question each, for an image of a split that is not for training."""
FIRST_GROUND = 101
"""Category ids of grounds start here, those of shapes at 1: not contiguous, as in COCO."""
LISTS = ("images", "segments", "instances", "refs", "talk", "captions")
Records = dict[str, list[dict[str, Any]]]
"""The records of a picture, by ``LISTS``."""
Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def write_splits(
    out: Path,
    images: int,
    val_images: int = 200,
    seed: int = 0,
    *,
    size: int = 128,
    variant: Variant = "easy",
    workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write ``out``/train, /val and /overfit (16 images); ``progress`` gets (split, done, total)."""
    for split, count in (("train", images), ("val", val_images), ("overfit", 16)):
        report = None if progress is None else _for_split(progress, split)
        write(out / split, count, seed, size=size, variant=variant, split=split, workers=workers, progress=report)


def _for_split(progress: Callable[[str, int, int], None], split: str) -> Progress:
    return lambda done, total: progress(split, done, total)


def write(
    out: Path,
    images: int,
    seed: int,
    *,
    size: int = 128,
    variant: Variant = "easy",
    split: str = "train",
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write images 0 to ``images`` - 1 of a split into the folder ``out``; the result does not depend on ``workers``.

    Nothing is done where ``out`` already holds exactly this. Raises UserError where it holds anything else, and for
    fewer than one image or a negative seed.
    """
    if images < 1 or seed < 0:
        raise UserError(f"ShapeWorld with {images} images and seed {seed}: at least 1 image, and a seed of 0 or more")
    marker = {
        "format": FORMAT, "split": split, "images": images, "seed": seed, "size": size, "variant": variant,
    }  # fmt: skip
    whole_folder(out, marker, lambda folder: _fill(folder, marker, workers, progress))


def whole_folder(out: Path, marker: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder that appears as ``out`` when it is whole, ``marker`` in it, or not at all.

    Nothing is done where ``out`` already holds exactly this. Raises UserError where it holds anything else.
    """
    if _is_there(out, marker):
        return
    partial = partial_folder(out)
    try:
        partial.chmod(0o755)
        fill(partial)
        (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf8")
        if not _is_there(out, marker):  # another process may have finished the same folder meanwhile
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_there(out: Path, marker: dict[str, Any]) -> bool:
    """Whether ``out`` holds the data set of ``marker``; UserError when it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / MARKER
    found = json.loads(path.read_text(encoding="utf8")) if path.is_file() else None
    if found == marker:
        return True
    what = "no ShapeWorld" if found is None else f"another ShapeWorld ({_difference(found, marker)})"
    raise UserError(f"{out}: holds {what}; nothing is overwritten: choose another folder or remove this one")


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [k for k in wanted if found.get(k) != wanted[k]]
    return ", ".join(f"{k} {found.get(k)} instead of {wanted[k]}" for k in keys)


def _fill(folder: Path, marker: dict[str, Any], workers: int, progress: Progress | None) -> None:
    (folder / "images").mkdir()
    (folder / "panoptic").mkdir()
    split, count = marker["split"], marker["images"]
    job = _Job(folder, split, marker["seed"], marker["size"], marker["variant"])
    files = _Files(folder, split)
    for done, records in enumerate(ordered(job, count, workers), start=1):
        files.add(records)
        if progress is not None:
            progress(done, count)
    files.close()


def categories(policy: Policy) -> list[dict[str, Any]]:
    """The category records of a split: the shapes its scenes may hold, then the grounds."""
    colours = list(PAINT.values())
    names = [(n, 1 + k, 1, "shape") for k, n in enumerate(shapes_of(policy))]
    names += [(n, FIRST_GROUND + k, 0, "ground") for k, n in enumerate(GROUNDS)]
    return [
        {"id": i, "name": n, "supercategory": above, "isthing": thing, "color": list(colours[k % len(colours)])}
        for k, (n, i, thing, above) in enumerate(names)
    ]


class _Rows:
    """A JSON list on disk that grows row by row."""

    def __init__(self, path: Path) -> None:
        self.file, self.count = path.open("w+", encoding="utf8"), 0

    def add(self, row: dict[str, Any]) -> None:
        """Append one record."""
        self.file.write((",\n" if self.count else "") + json.dumps(row, separators=(",", ":")))
        self.count += 1

    def copy(self, target: IO[str]) -> None:
        """Write the whole list."""
        self.file.seek(0)
        target.write("[")
        shutil.copyfileobj(self.file, target)
        target.write("]\n")


class _Files:
    """The growing annotation lists of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.sentences = folder, 0
        self.categories = categories(SPLITS[split][1])
        self.rows = {name: _Rows(folder / f"{name}.rows") for name in LISTS}

    def add(self, records: Records) -> None:
        """Append the records of the next picture; references and sentences are numbered through the split."""
        before = self.rows["refs"].count
        for record in records["refs"]:
            record["ref_id"] += before
            for sentence in record["sentences"]:
                sentence["sent_id"] += self.sentences
            record["sent_ids"] = [sentence["sent_id"] for sentence in record["sentences"]]
        self.sentences += sum(len(record["sentences"]) for record in records["refs"])
        for name, rows in self.rows.items():
            for record in records[name]:
                rows.add(record)

    def close(self) -> None:
        """Put the lists together into the JSON files."""
        self._coco("panoptic.json", self.rows["segments"], self.categories)
        self._coco("instances.json", self.rows["instances"], [c for c in self.categories if c["isthing"]])
        for name in ("refs", "talk", "captions"):
            with (self.folder / f"{name}.json").open("w", encoding="utf8") as file:
                self.rows[name].copy(file)
        for rows in self.rows.values():
            rows.file.close()
            Path(rows.file.name).unlink()

    def _coco(self, name: str, annotations: _Rows, listed: list[dict[str, Any]]) -> None:
        with (self.folder / name).open("w", encoding="utf8") as file:
            file.write('{"images": ')
            self.rows["images"].copy(file)
            file.write(f', "categories": {json.dumps(listed)},\n"annotations": ')
            annotations.copy(file)
            file.write("}\n")


@dataclass(frozen=True)
class _Job:
    """Write the files of a picture and return its records, for every list."""

    folder: Path
    split: str
    seed: int
    size: int
    variant: Variant

    def __call__(self, index: int) -> Records:
        scene = split_scene(self.seed, self.split, index, side=self.size, variant=self.variant)
        rng = np.random.default_rng([self.seed, SPLITS[self.split][0] + index, 1])
        number, name = index + 1, f"{index + 1:012d}.png"
        Image.fromarray(draw(scene)).save(self.folder / "images" / name, compress_level=3)
        # spread over the 24 bits, so that the PNG is colourful and readers must use all three channels
        write_id_map(self.folder / "panoptic" / name, scene.owner.astype(np.int64) * SPREAD)
        ids = {c["name"]: int(c["id"]) for c in categories(SPLITS[self.split][1])}
        names = [*scene.ground.names, *(thing.shape for thing in scene.things)]
        segments = [coco_segment(scene.owner == i + 1, ids[n], (i + 1) * SPREAD) for i, n in enumerate(names)]
        return {
            "images": [{"id": number, "file_name": name, "height": scene.side, "width": scene.side}],
            "segments": [{"image_id": number, "file_name": name, "segments_info": segments}],
            "instances": [
                {
                    **segment,
                    "id": annotation_id(number, thing),
                    "image_id": number,
                    "segmentation": to_json(encode(scene.visible(thing))),
                }
                for thing, segment in enumerate(segments[len(scene.ground.names) :])
            ],
            # in this order, which the draws follow
            "refs": self._refs(scene, number, ids, rng),
            "talk": self._talk(scene, number, rng),
            "captions": [_conversation(f"{number}", number, _descriptions(scene, rng))],
        }

    def _refs(self, scene: Scene, number: int, ids: dict[str, int], rng: np.random.Generator) -> list[dict[str, Any]]:
        """One reference per meant thing, one per sentence that means nothing, as gRefCOCO has them; numbered from 0."""
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for k, expression in enumerate(expressions(scene, rng, EXPRESSIONS)):
            sentence = {
                "sent_id": k,
                "sent": expression.text,
                "raw": expression.text,
                "tokens": expression.text.split(),
                "kind": expression.kind,
                "explanation": f"{place_of(scene, expression.things)}.",
            }
            # a reference without things has a group of its own: -1, -2, …
            groups.setdefault(expression.things or (-k - 1,), []).append(sentence)
        return [
            {
                "ref_id": k,
                "ann_id": [] if things[0] < 0 else annotation_id(number, things[0]),
                "category_id": -1 if things[0] < 0 else ids[scene.things[things[0]].shape],
                "image_id": number,
                "file_name": f"{number:012d}.png",
                "split": self.split,
                "sent_ids": [],
                "sentences": sentences,
            }
            for k, (things, sentences) in enumerate(groups.items())
        ]

    def _talk(self, scene: Scene, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        if self.split == "train":
            asked = [*questions(scene, rng, QUESTIONS), *places(scene, rng, PLACES)]
            conversations = [[asked[i] for i in rng.permutation(len(asked))]]
        else:
            conversations = [[question] for question in questions(scene, rng, VAL_QUESTIONS)]
        return [_conversation(f"{number}-{part}", number, asked) for part, asked in enumerate(conversations)]


def _descriptions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    found = descriptions(scene, rng)
    return [Question("description", *found[i]) for i in rng.permutation(len(found))]


def _conversation(key: str, number: int, asked: Sequence[Question]) -> dict[str, Any]:
    return {
        "id": key,
        "image": f"{number:012d}.png",
        "question_type": asked[-1].type,
        "conversations": [turn for k, question in enumerate(asked) for turn in _turns(question, k == 0)],
    }


SPREAD = 1_111_111
"""Factor from ``Scene.owner`` to panoptic ids; 15 owners fit into 24 bits."""


def annotation_id(image: int, thing: int) -> int:
    """Return the id of a thing's COCO annotation."""
    return 100 * image + thing + 1


def coco_segment(mask: np.ndarray, category: int, key: int) -> dict[str, Any]:
    """Return what COCO says of a (H, W) bool mask besides the mask: its area, its box and that it is no crowd."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    return {"id": key, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}


def _turns(question: Question, first: bool) -> list[dict[str, str]]:
    head = f"{IMAGE}\n" if first else ""
    return [{"from": "human", "value": head + question.text}, {"from": "gpt", "value": question.answer}]
