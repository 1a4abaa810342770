"""One line of xseg's JSONL, checked: its keys, its words, and the samples it is split into.

``xseg/data/sources/jsonl.py`` says what a line holds; here is what of it needs no mask.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from xseg.data.records import field, records
from xseg.errors import UserError, did_you_mean
from xseg.geometry.views import read_size
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN, REGION, SEG, SENTINELS, SPECIAL_TOKENS
from xseg.types import Masks, Phrase, Sample, Size, Turn

LINE = {"image", "images", "objects", "phrases", "caption", "spans", "turns", "ignore", "size", "id", "kind"}
OBJECT = {"segmentation", "category", "id", "crowd", "prompts", "explanation"}
PHRASE = {"text", "objects", "explanation", "kind", "id"}
MARKERS = (*SPECIAL_TOKENS, *SENTINELS)
FAR = 1_000_000
"""Pixels; no coordinate is further out, and a stroke to there still fits into memory."""
Record = dict[str, Any]
Grouping = Literal["image", "sentence", "object"]


class Part(NamedTuple):
    """What of a line is a sample of its own."""

    key: Literal["phrases", "objects"]
    place: int


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers; UserError where there is none."""
    try:
        lines = path.read_text(encoding="utf8").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such annotation file; check the recipe's options and the data root") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the annotation file cannot be read ({error}); a JSONL is UTF-8 text") from error
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{path}: no sample there: a JSONL has one JSON object a line; write it anew")
    return found


def parsed(text: str, where: str) -> Record:
    """The object of a line, its keys checked."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object ({error}); every line is one whole object") from error
    check_keys(row, LINE, where)
    if "image" in row and "images" in row:
        raise UserError(f"{where}: both 'image' and 'images': give one of them")
    return row  # type: ignore[no-any-return]


def glanced(lines: Sequence[tuple[int, str]]) -> Iterator[Mapping[str, Any]]:
    """Every line's object before anything is checked: {} for one that is none, which is an error when it is read."""
    for _, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = {}
        yield row if isinstance(row, dict) else {}


def names_in(row: Mapping[str, Any]) -> Iterator[str]:
    """The categories of an unchecked line, without those that are an error when it is read."""
    for item in _objects(row):
        try:
            if "category" in item:
                yield words(item["category"], "category", MARKERS)
        except UserError:
            continue


def parts(row: Mapping[str, Any], grouping: Grouping | None) -> list[Part | None]:
    """The samples of a line; [None] = it is one as it stands.

    ``grouping`` None: as evaluation wants it, where only one task can be meant. Turns or names of objects are for other
    tasks, which would see a picture again with every phrase.
    """
    phrases = row.get("phrases")
    asked = len(phrases) if isinstance(phrases, list) else 0
    objects = _objects(row)
    if grouping is None and ("turns" in row or "caption" in row or any("category" in item for item in objects)):
        grouping = "image"
    found: list[Part | None] = []
    if grouping == "sentence" or (grouping is None and asked):
        found = [Part("phrases", place) for place in range(asked)]
    elif grouping != "image":
        found = [Part("objects", place) for place, item in enumerate(objects) if item.get("crowd") not in (True, 1)]
    return found if len(found) > 1 else [None]


def _objects(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The objects of an unchecked line; {} stands for what is none, so that places stay."""
    found = row.get("objects")
    return [item if isinstance(item, dict) else {} for item in found] if isinstance(found, list) else []


def part_of(sample: Sample, part: Part | None) -> Sample:
    """A line's sample with one phrase and the objects it names, or with one object; its key tells which."""
    if part is None:
        return sample
    rows: tuple[int, ...] = (part.place,)
    phrases: tuple[Phrase, ...] = ()
    if part.key == "phrases":
        phrase = sample.phrases[part.place]
        rows = phrase.instances
        phrases = (dataclasses.replace(phrase, instances=tuple(range(len(rows)))),)
    masks = None if sample.masks is None else Masks(sample.masks.size, tuple(sample.masks.rles[row] for row in rows))
    instances = tuple(dataclasses.replace(sample.instances[row], mask=place) for place, row in enumerate(rows))
    key = f"{sample.key}:{part.place}"
    return dataclasses.replace(sample, key=key, masks=masks, instances=instances, phrases=phrases, turns=())


def check_keys(row: Any, known: set[str], where: str) -> None:
    """UserError for what is no object, and for a key that nobody reads."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with keys, found {str(row)[:60]!r}")
    for key in row:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), known)}")


def files_of(row: Record, where: str) -> list[str]:
    """The names of a line's pictures."""
    files = [row["image"]] if "image" in row else row.get("images", [])
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{where}: images: {str(files)[:60]} must be names of files; correct it")
    return files


def size_of(row: Record, images: Sequence[Path], where: str) -> Size:
    """(H, W) as the line says or its picture has; (0, 0) for a line without masks."""
    if "size" in row:
        size = row["size"]
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in size):
            raise UserError(f"{where}: size: {size!r} must be [height, width] in pixels; correct it or leave it out")
        return size[0], size[1]
    masked = any(key in row for key in ("objects", "phrases", "spans", "ignore"))
    if masked and not images:
        raise UserError(f"{where}: masks or phrases without an 'image'; name the file they belong to")
    return read_size(images[0], where) if masked else (0, 0)


def words(value: Any, where: str, barred: Sequence[str] = (), *, needed: bool = True) -> str:
    """A text of a line; UserError for none, for an empty one where it is ``needed``, and for ``barred`` markers, which
    would be read as a picture, a prompt, a span or a mask."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {str(value)[:60]} must be a text; write it in quotes, or leave the key out")
    text = str(value)
    if needed and not text.strip():
        raise UserError(f"{where}: {text!r} has no words; write them, or leave the key out")
    found = next((marker for marker in barred if marker in text), None)
    if found is not None:
        raise UserError(f"{where}: {text[:60]!r} holds {found}, which is a sign to the model; take it out")
    return text


def truth(item: Record, key: str, where: str) -> bool:
    """A yes or no, which is no when the key is missing."""
    value = item.get(key, False)
    if not isinstance(value, int) or value not in (0, 1):
        raise UserError(f"{where}: {key}: {str(value)[:60]!r} must be true or false, without quotes; correct it")
    return bool(value)


def explanation_of(item: Record, where: str) -> str:
    """The words that an answer may say with its mask; <SEG>, <p> and </p> in them are left out when they are said."""
    told = item.get("explanation")
    return "" if told is None else words(told, f"{where}: explanation", tuple(SENTINELS), needed=False)


def texts_of(row: Record, objects: int, key: str, where: str) -> tuple[tuple[Phrase, ...], tuple[Turn, ...]]:
    """The phrases and turns of a line; a caption is one assistant turn, and its spans are the phrases."""
    if "caption" in row:
        if "phrases" in row or "turns" in row:
            raise UserError(f"{where}: 'caption' with 'phrases' or 'turns': one line holds one kind of text; split it")
        return _caption(row, objects, key, where)
    if "spans" in row:
        raise UserError(f"{where}: 'spans' without a 'caption'; add the caption with its {P_OPEN}…{P_CLOSE} marks")
    return _phrases(row, objects, key, where), _turns(row, where)


def _caption(row: Record, objects: int, key: str, where: str) -> tuple[tuple[Phrase, ...], tuple[Turn, ...]]:
    caption = words(row["caption"], f"{where}: caption", (SEG, IMAGE, REGION), needed=False)
    spans = records(row, "spans", where) if "spans" in row else []
    texts = [part.split(P_CLOSE)[0].strip() for part in caption.split(P_OPEN)[1:]]
    if len(texts) != len(spans) or caption.count(P_CLOSE) != len(texts):
        raise UserError(
            f"{where}: {len(texts)} {P_OPEN} and {caption.count(P_CLOSE)} {P_CLOSE} in the caption, {len(spans)} "
            f"entries in 'spans': each span needs both marks and its list of objects"
        )
    rows = [_chosen(chosen, objects, f"{where}: spans[{i}]") for i, chosen in enumerate(spans)]
    phrases = [Phrase(t, r, f"{key}:{i}") for i, (t, r) in enumerate(zip(texts, rows, strict=True))]
    return tuple(phrases), (Turn("assistant", caption),)


def _phrases(row: Record, objects: int, key: str, where: str) -> tuple[Phrase, ...]:
    out = []
    for i, item in enumerate(records(row, "phrases", where) if "phrases" in row else ()):
        place = f"{where}: phrases[{i}]"
        check_keys(item, PHRASE, place)
        text = words(field(item, "text", place), f"{place}: text", MARKERS).strip()
        rows = _chosen(field(item, "objects", place), objects, place)
        kind = str(item.get("kind", "" if rows else "no-target"))
        phrase_id = str(item.get("id", f"{key}:{i}"))
        out.append(Phrase(text, rows, phrase_id, kind, explanation_of(item, place)))
    return tuple(out)


def _turns(row: Record, where: str) -> tuple[Turn, ...]:
    out = []
    for i, item in enumerate(records(row, "turns", where) if "turns" in row else ()):
        place = f"{where}: turns[{i}]"
        check_keys(item, {"role", "text"}, place)
        role = field(item, "role", place)
        if role != ("user", "assistant")[i % 2]:
            raise UserError(f"{place}: role {role!r}: turns alternate, 'user' first, then 'assistant'; reorder them")
        out.append(Turn(role, words(field(item, "text", place), f"{place}: text", needed=False)))
    return tuple(out)


def _chosen(value: Any, objects: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < objects for i in value):
        raise UserError(f"{where}: objects {value!r} must be a list of numbers from 0 to {objects - 1}; correct it")
    return tuple(dict.fromkeys(value))


def are_coordinates(value: Any) -> bool:
    """Whether a value is [x, y, …] or [[x, y], …] of numbers near enough to be pixels."""
    if not isinstance(value, list) or not value:
        return False
    pairs = value if all(isinstance(item, list) and len(item) == 2 for item in value) else [value]
    return all(len(p) % 2 == 0 and all(isinstance(v, int | float) and abs(v) <= FAR for v in p) for p in pairs)
