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
above 0 are the mask. A prompt is a segmentation too, or as above. Files are relative to the folder of the JSONL, or to
the option ``images``.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xseg.data.records import Packed, field, records, whole
from xseg.data.sources.semantic import read_label_map
from xseg.errors import UserError, did_you_mean
from xseg.geometry import prompts as drawn
from xseg.geometry.masks import encode, rle_from_segmentation, row_rle, to_json
from xseg.geometry.views import read_size
from xseg.paths import data_path
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN
from xseg.types import Categories, Instance, Masks, Phrase, Sample, Size, Turn

LINE = {"image", "images", "objects", "phrases", "caption", "spans", "turns", "ignore", "size", "id", "kind"}
OBJECT = {"segmentation", "category", "id", "crowd", "prompts", "explanation"}
PHRASE = {"text", "objects", "explanation", "kind", "id"}
Record = dict[str, Any]


class Source:
    """One sample per line of the file ``jsonl``, as this module's text describes it; blank lines are skipped.

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
        name: str = "jsonl",
    ) -> None:
        self.prefix, self.path = f"{name}/{split}", data_path(root, jsonl)
        self.images = self.path.parent if images is None else data_path(root, images)
        lines = [(n, line) for n, line in enumerate(_lines(self.path), start=1) if line.strip()]
        self.lines = Packed(lines)
        names = list(_names(lines) if categories is None else categories)
        unknown = [n for n in stuff if n not in names]
        if unknown:
            raise UserError(f"{self.path}: stuff: {unknown[0]!r} is no category{did_you_mean(unknown[0], names)}")
        self.categories: Categories | None = None
        if names:
            self.categories = Categories(tuple(names), tuple(range(len(names))), tuple(n not in stuff for n in names))
        self.index = {n: i for i, n in enumerate(names)}

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        number, text = self.lines[index]
        where = f"{self.path}: line {number}"
        row = _parsed(text, where)
        files = [row["image"]] if "image" in row else row.get("images", [])
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise UserError(f"{where}: images: {str(files)[:60]} must be names of files; correct it")
        images = tuple(self.images / file for file in files)
        key = str(row.get("id", number))
        size = _size(row, images, where)
        rles, instances = self._objects(row, size, where)
        phrases, turns = _texts(row, len(instances), key, where)
        ignore = row.get("ignore")
        return Sample(
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

    def texts(self, index: int) -> tuple[str, ...]:
        """``<image>`` for each image, the turns and phrases of a sample, explanations too; its objects, by
        their explanations, where nothing else is said about them."""
        number, line = self.lines[index]
        where = f"{self.path}: line {number}"
        row = _parsed(line, where)
        objects = records(row, "objects", where) if "objects" in row else []
        phrases, turns = _texts(row, len(objects), "", where)
        said = [turn.text.replace(IMAGE, "") for turn in turns]
        if "caption" not in row:  # its phrases stand in the one turn
            said += [phrase.text + phrase.explanation for phrase in phrases]
        images = 1 if "image" in row else len(row.get("images", ()))
        return (*[IMAGE] * images, *(said or [str(item.get("explanation") or "") for item in objects]))

    def outlines(self, index: int) -> Iterator[tuple[str, Any]]:
        """(place, [x1, y1, x2, y2, …]) of every polygon as written."""
        number, text = self.lines[index]
        where = f"{self.path}: line {number}"
        for place, row in enumerate(_parsed(text, where).get("objects", ())):
            if isinstance(row.get("segmentation"), list):
                yield from ((f"{where}: objects[{place}]", polygon) for polygon in row["segmentation"])

    def _objects(self, row: Record, size: Size, where: str) -> tuple[tuple[Any, ...], tuple[Instance, ...]]:
        rles, instances = [], []
        for number, item in enumerate(records(row, "objects", where) if "objects" in row else ()):
            place = f"{where}: objects[{number}]"
            _check_keys(item, OBJECT, place)
            category = -1
            if "category" in item:
                name = str(item["category"])
                if name not in self.index:
                    raise UserError(f"{place}: category {name!r} is not in the recipe{did_you_mean(name, self.index)}")
                category = self.index[name]
            rles.append(self._rle(field(item, "segmentation", place), size, place))
            given = item.get("prompts", {})
            if not isinstance(given, Mapping):
                raise UserError(f"{place}: prompts: {str(given)[:60]!r} must map kinds to prompts; correct it")
            prompts = {kind: self._prompt(kind, value, size, f"{place}: {kind}") for kind, value in given.items()}
            crowd, key, told = bool(item.get("crowd", False)), whole(item, "id", place, number), item.get("explanation")
            instances.append(Instance(number, category, crowd, key, prompts, str(told or "")))
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
            return self._rle(value, size, where)
        if not _numbers(value) or (kind == "box" and len(value) != 4):
            raise UserError(
                f"{where}: {str(value)[:60]} must be [x, y] or a list of them for a point, a list of [x, y] for a "
                f"scribble, [x1, y1, x2, y2] for a box, or a segmentation"
            )
        return encode(drawn.widen(kind, makers[kind](size, value)))


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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf8").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such annotation file; check the recipe's options and the data root") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the annotation file cannot be read ({error}); a JSONL is UTF-8 text") from error


def _names(lines: Sequence[tuple[int, str]]) -> list[str]:
    """The categories in order of appearance. Lines that do not parse name none: they are errors when they are read."""
    names: dict[str, None] = {}
    for _, line in lines:
        try:
            row = json.loads(line)
            names.update({str(item["category"]): None for item in row.get("objects", ()) if "category" in item})
        except (ValueError, TypeError, AttributeError):
            continue
    return list(names)


def _parsed(text: str, where: str) -> Record:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object ({error}); every line is one whole object") from error
    _check_keys(row, LINE, where)
    if "image" in row and "images" in row:
        raise UserError(f"{where}: both 'image' and 'images': give one of them")
    return row  # type: ignore[no-any-return]


def _check_keys(row: Any, known: set[str], where: str) -> None:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with keys, found {str(row)[:60]!r}")
    for key in row:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), known)}")


def _size(row: Record, images: Sequence[Path], where: str) -> Size:
    if "size" in row:
        size = row["size"]
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in size):
            raise UserError(f"{where}: size: {size!r} must be [height, width] in pixels; correct it or leave it out")
        return size[0], size[1]
    masked = any(key in row for key in ("objects", "phrases", "spans", "ignore"))
    if masked and not images:
        raise UserError(f"{where}: masks or phrases without an 'image'; name the file they belong to")
    return read_size(images[0], where) if masked else (0, 0)


def _texts(row: Record, objects: int, key: str, where: str) -> tuple[tuple[Phrase, ...], tuple[Turn, ...]]:
    """The phrases and turns of a line; a caption is one assistant turn, and its spans are the phrases."""
    if "caption" in row:
        if "phrases" in row or "turns" in row:
            raise UserError(f"{where}: 'caption' with 'phrases' or 'turns': one line holds one kind of text; split it")
        caption, spans = str(row["caption"]), row.get("spans", [])
        texts = [part.split(P_CLOSE)[0].strip() for part in caption.split(P_OPEN)[1:]]
        if len(texts) != len(spans) or caption.count(P_CLOSE) != len(texts):
            raise UserError(
                f"{where}: {len(texts)} {P_OPEN} and {caption.count(P_CLOSE)} {P_CLOSE} in the caption, {len(spans)} "
                f"entries in 'spans': each span needs both marks and its list of objects"
            )
        rows = [_chosen(chosen, objects, f"{where}: spans[{i}]") for i, chosen in enumerate(spans)]
        phrases = [Phrase(t, r, f"{key}:{i}") for i, (t, r) in enumerate(zip(texts, rows, strict=True))]
        return tuple(phrases), (Turn("assistant", caption),)
    if "spans" in row:
        raise UserError(f"{where}: 'spans' without a 'caption'; add the caption with its {P_OPEN}…{P_CLOSE} marks")
    return _phrases(row, objects, key, where), _turns(row, where)


def _phrases(row: Record, objects: int, key: str, where: str) -> tuple[Phrase, ...]:
    out = []
    for i, item in enumerate(records(row, "phrases", where) if "phrases" in row else ()):
        place = f"{where}: phrases[{i}]"
        _check_keys(item, PHRASE, place)
        text = str(field(item, "text", place)).strip()
        rows = _chosen(field(item, "objects", place), objects, place)
        kind = str(item.get("kind", "" if rows else "no-target"))
        phrase_id = str(item.get("id", f"{key}:{i}"))
        out.append(Phrase(text, rows, phrase_id, kind, str(item.get("explanation") or "")))
    return tuple(out)


def _turns(row: Record, where: str) -> tuple[Turn, ...]:
    out = []
    for i, item in enumerate(records(row, "turns", where) if "turns" in row else ()):
        place = f"{where}: turns[{i}]"
        _check_keys(item, {"role", "text"}, place)
        role = field(item, "role", place)
        if role != ("user", "assistant")[i % 2]:
            raise UserError(f"{place}: role {role!r}: turns alternate, 'user' first, then 'assistant'; reorder them")
        out.append(Turn(role, str(field(item, "text", place))))
    return tuple(out)


def _chosen(value: Any, objects: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < objects for i in value):
        raise UserError(f"{where}: objects {value!r} must be a list of numbers from 0 to {objects - 1}; correct it")
    return tuple(dict.fromkeys(value))


def _numbers(value: Any) -> bool:
    """Whether a value is [x, y, …] or [[x, y], …] of numbers."""
    if not isinstance(value, list) or not value:
        return False
    pairs = value if all(isinstance(item, list) and len(item) == 2 for item in value) else [value]
    return all(len(p) % 2 == 0 and all(isinstance(v, int | float) for v in p) for p in pairs)
