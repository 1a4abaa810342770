"""xseg's own format: one JSON object a line, one line a sample, any task.

::

    {"image": "a.jpg",
     "objects": [{"segmentation": [[x1, y1, x2, y2, …]], "category": "dog", "id": 3, "crowd": false,
                  "prompts": {"point": [x, y], "scribble": [[x, y], …], "box": [x1, y1, x2, y2]},
                  "explanation": "It is the nearest."}],
     "phrases": [{"text": "the left dog", "objects": [0], "explanation": "It is nearer to the ball.", "kind": "place"}],
     "caption": "<p>a dog</p> beside <p>two cats</p>", "spans": [[0], [1, 2]],
     "turns": [{"role": "user", "text": "What is this?"}, {"role": "assistant", "text": "A dog."}],
     "ignore": segmentation, "size": [height, width], "id": "any text", "kind": "any text"}

======================== =======================================================================================
task                     a line needs
======================== =======================================================================================
generic, open vocabulary objects with a category
referring, reasoning     phrases; "objects" counts from 0, [] = the thing is not in the picture
grounded conversation    caption and spans: the objects of the k-th ``<p>…</p>``; such a line has no phrases
interactive              objects; prompts only where they shall not be drawn from the mask
visual prompts (VGD)     objects with a category; prompts likewise
conversation             turns; no "image" for plain text, "images": […] for several
======================== =======================================================================================

A segmentation is a list of polygons, an RLE {"size": [H, W], "counts": text or list}, or the name of a PNG whose pixels
above 0 are the mask. A prompt is a segmentation too, or as above; one that has no pixel in the picture is an error.
Files are relative to the folder of the JSONL, or to the option ``images``. Of a line with several phrases, or several
objects to point at, evaluation makes a sample of each; the option ``grouping`` says otherwise.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from xseg.data import jsonl_line as line
from xseg.data.jsonl_line import Grouping, Part, Record
from xseg.data.records import Packed, field, records, whole
from xseg.data.sources.semantic import read_label_map
from xseg.errors import UserError, did_you_mean
from xseg.geometry import prompts as drawn
from xseg.geometry.masks import area, encode, rle_from_segmentation, row_rle, to_json
from xseg.paths import data_path
from xseg.tokens import IMAGE, P_OPEN
from xseg.types import Categories, Instance, Masks, Sample, Size


class Source:
    """Samples of the file ``jsonl``, as this module's text describes it; blank lines are skipped.

    ``grouping`` "image" (default where the split's name starts with "train"): one sample a line. "sentence": one per
    phrase, with the objects it names; "object": one per object that is no crowd, without the phrases. By default other
    splits have a sample per phrase of lines with phrases, and per object of lines without; but lines with turns, a
    caption or objects of a category stay whole, because other tasks read them too. Keys read ``name/split/id of the
    line``, then ``:number`` of the phrase or object where it has several.
    ``categories`` lists the names in their order; by default those of the file in order of appearance. ``stuff`` names
    those that are no countable things. A line is checked when its sample is asked for.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        jsonl: str,
        images: str | None = None,
        categories: Sequence[str] | None = None,
        stuff: Sequence[str] = (),
        grouping: Grouping | None = None,
        name: str = "jsonl",
    ) -> None:
        if grouping not in (None, *get_args(Grouping)):
            raise UserError(f"source jsonl: grouping: {grouping!r} must be 'image', 'sentence' or 'object'")
        self.prefix, self.path = f"{name}/{split}", data_path(root, jsonl)
        self.images = self.path.parent if images is None else data_path(root, images)
        listed, uncounted = (_listed(names, where) for names, where in ((categories, "categories"), (stuff, "stuff")))
        lines = line.read_lines(self.path)
        self.lines = Packed(lines)
        grouping = grouping or ("image" if split.startswith("train") else None)
        found: dict[str, None] = {}
        parts: list[tuple[int, Part | None]] = []
        # a large file is not gone through before training where its lines tell nothing that is not known
        known = grouping == "image" and categories is not None
        for number, row in enumerate(({} for _ in lines) if known else line.glanced(lines)):
            found.update(dict.fromkeys(line.names_in(row)))
            parts += [(number, part) for part in line.parts(row, grouping)]
        self.parts = Packed(parts)
        names = list(found) if categories is None else listed
        unknown = [n for n in uncounted if n not in names]
        if unknown:
            raise UserError(f"{self.path}: stuff: {unknown[0]!r} is no category{did_you_mean(unknown[0], names)}")
        self.categories: Categories | None = None
        if names:
            things = tuple(n not in uncounted for n in names)
            self.categories = Categories(tuple(names), tuple(range(len(names))), things)
        self.index = {n: i for i, n in enumerate(names)}

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Sample:
        row, part, number, where = self._row(index)
        files = line.files_of(row, where)
        images = tuple(self.images / file for file in files)
        key = str(row.get("id", number))
        size = line.size_of(row, images, where)
        rles, instances = self._objects(row, size, where)
        phrases, turns = line.texts_of(row, len(instances), key, where)
        ignore = row.get("ignore")
        sample = Sample(
            key=f"{self.prefix}/{key}",
            images=images,
            size=size,
            masks=Masks(size, rles) if images else None,
            instances=instances,
            categories=self.categories,
            phrases=phrases,
            turns=turns,
            image_id=str(files[0]) if files else key,
            kind=str(row.get("kind", "")),
            ignore=None if ignore is None else self._rle(ignore, size, f"{where}: ignore"),
        )
        return line.part_of(sample, part)

    def _row(self, index: int) -> tuple[Record, Part | None, int, str]:
        """The line of a sample, which part of it the sample is, the line's number, and its place for messages."""
        place, part = self.parts[index]
        number, text = self.lines[place]
        where = f"{self.path}: line {number}"
        return line.parsed(text, where), part, number, where

    def texts(self, index: int) -> tuple[str, ...]:
        """``<image>`` for each image, the turns and phrases of a sample, explanations too; its objects, by
        their explanations, where nothing else is said about them."""
        row, part, _, where = self._row(index)
        objects = records(row, "objects", where) if "objects" in row else []
        pictures = [IMAGE] * len(line.files_of(row, where))
        if part is not None and part.key == "objects":
            return (*pictures, line.explanation_of(objects[part.place], where))
        phrases, turns = line.texts_of(row, len(objects), "", where)
        if part is not None:
            phrases, turns = (phrases[part.place],), ()
        said = [turn.text.replace(IMAGE, "") for turn in turns]
        if "caption" not in row:  # its phrases stand in the one turn
            said += [phrase.text + phrase.explanation for phrase in phrases]
        return (*pictures, *(said or [str(item.get("explanation") or "") for item in objects]))

    def outlines(self, index: int) -> Iterator[tuple[str, Any]]:
        """(place, [x1, y1, x2, y2, …]) of every polygon as written."""
        row, _, _, where = self._row(index)
        for place, item in enumerate(row.get("objects", ())):
            if isinstance(item.get("segmentation"), list):
                yield from ((f"{where}: objects[{place}]", polygon) for polygon in item["segmentation"])

    def _objects(self, row: Record, size: Size, where: str) -> tuple[tuple[Any, ...], tuple[Instance, ...]]:
        rles, instances = [], []
        for number, item in enumerate(records(row, "objects", where) if "objects" in row else ()):
            place = f"{where}: objects[{number}]"
            line.check_keys(item, line.OBJECT, place)
            category = -1
            if "category" in item:
                name = line.words(item["category"], f"{place}: category", line.MARKERS)
                if name not in self.index:
                    raise UserError(f"{place}: category {name!r} is not in the recipe{did_you_mean(name, self.index)}")
                category = self.index[name]
            rles.append(self._rle(field(item, "segmentation", place), size, place))
            given = item.get("prompts", {})
            if not isinstance(given, Mapping):
                raise UserError(f"{place}: prompts: {str(given)[:60]!r} must map kinds to prompts; correct it")
            prompts = {kind: self._prompt(kind, value, size, f"{place}: {kind}") for kind, value in given.items()}
            crowd, key = line.truth(item, "crowd", place), whole(item, "id", place, number)
            instances.append(Instance(number, category, crowd, key, prompts, line.explanation_of(item, place)))
        return tuple(rles), tuple(instances)

    def _rle(self, segmentation: Any, size: Size, where: str) -> dict[str, Any]:
        if not isinstance(segmentation, str):
            return rle_from_segmentation(segmentation, size, where)
        found = read_label_map(self.images / segmentation) > 0
        if found.shape != size:
            raise UserError(
                f"{where}: {segmentation} is {list(found.shape)} (height, width), its image {list(size)}: a mask has "
                f"exactly its image's size; repair one of them"
            )
        return encode(found)

    def _prompt(self, kind: str, value: Any, size: Size, where: str) -> dict[str, Any]:
        makers: dict[str, Callable[[Size, Any], np.ndarray]] = {
            "point": drawn.from_points,
            "scribble": drawn.from_path,
            "box": drawn.from_box,
        }
        if kind not in makers or isinstance(value, Mapping | str):
            rle = self._rle(value, size, where)
        elif not line.are_coordinates(value) or (kind == "box" and len(value) != 4):
            raise UserError(
                f"{where}: {str(value)[:60]} must be [x, y] or a list of them for a point, a list of [x, y] for a "
                f"scribble, [x1, y1, x2, y2] for a box, or a segmentation"
            )
        else:
            rle = encode(drawn.widen(kind, makers[kind](size, value)))
        if not area(rle):
            rule = ": a box is [x1, y1, x2, y2] with x1 < x2 and y1 < y2, no width or height" if kind == "box" else ""
            raise UserError(
                f"{where}: {str(value)[:60]}: no pixel of it lies in the image of {list(size)} (height, width){rule}; "
                "correct it, or leave the prompt out"
            )
        return rle


def to_line(sample: Sample, folder: Path) -> str:
    """Write a sample as a line of a JSONL in ``folder``; its images are named relative to it. Inverse of ``Source``."""
    row: Record = {"id": sample.key}
    files = [Path(os.path.relpath(str(image), folder)).as_posix() for image in sample.images]
    if files:
        row.update({"image": files[0]} if len(files) == 1 else {"images": files})
    if sample.size != (0, 0):
        row["size"] = list(sample.size)
    if sample.instances and sample.masks is not None:
        row["objects"] = [_object(instance, sample) for instance in sample.instances]
    grounded = len(sample.turns) == 1 and sample.turns[0].role == "assistant"
    if grounded:
        row["caption"] = sample.turns[0].text
        row["spans"] = [list(p.instances) for p in sample.phrases[: row["caption"].count(P_OPEN)]]
    else:
        keys = ("explanation", "kind")
        row["phrases"] = [
            {"text": p.text, "objects": list(p.instances), **{k: getattr(p, k) for k in keys if getattr(p, k)}}
            for p in sample.phrases
        ]
        row["turns"] = [{"role": turn.role, "text": turn.text} for turn in sample.turns]
    if sample.ignore is not None:
        row["ignore"] = to_json(sample.ignore)
    if sample.kind:
        row["kind"] = sample.kind
    return json.dumps({k: v for k, v in row.items() if v != []}, ensure_ascii=False)


def _object(instance: Instance, sample: Sample) -> Record:
    assert sample.masks is not None
    row: Record = {"segmentation": to_json(row_rle(sample.masks, instance.mask)), "id": instance.id}
    if sample.categories is not None and instance.category >= 0:
        row["category"] = sample.categories.names[instance.category]
    if instance.is_crowd:
        row["crowd"] = True
    if instance.prompts:
        row["prompts"] = {kind: to_json(rle) for kind, rle in instance.prompts.items()}
    if instance.explanation:
        row["explanation"] = instance.explanation
    return row


def _listed(names: Any, option: str) -> list[str]:
    """The names of an option, each a text, and each once."""
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise UserError(f"source jsonl: {option}: {names!r} must be a list of names; put it in [ ]")
    out: list[str] = []
    for name in names or ():
        if not isinstance(name, str):
            raise UserError(
                f"source jsonl: {option}: {name!r} must be a name; put it in quotes (YAML reads no as false)"
            )
        if name in out:
            raise UserError(
                f"source jsonl: {option}: {name!r} is there twice; every name is one category: take one out"
            )
        out.append(line.words(name, f"source jsonl: {option}", line.MARKERS))
    return out
