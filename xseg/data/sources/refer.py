"""Referring expressions in the REFER layout (RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO) over COCO instance masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from xseg.data.records import Packed, field, read_records, records
from xseg.data.sources.coco import category_index, read_categories, read_images, slim_annotation
from xseg.errors import UserError, did_you_mean
from xseg.geometry.masks import rle_from_segmentation
from xseg.paths import data_path
from xseg.tokens import IMAGE
from xseg.types import Categories, Instance, Masks, Phrase, Sample

Record = dict[str, Any]
Grouping = Literal["image", "sentence", "reference"]
MAX_PHRASES = 8
"""Most expressions in one training sample (X-SAM's data: at most 8 turns)."""


class Source:
    """Samples of referring expressions; ``refs`` is the release's pickle or the same records as JSON.

    ``grouping`` "image" (default where the split's name starts with "train"): an image's expressions together, at most
    8 a sample, every (object, sentence) once, different objects first. "sentence" (default elsewhere): one sample per
    object and unique lower-cased sentence, the protocol X-SAM reports. "reference": all sentences of one reference are
    a sample, for the task's option ``sentences: merged`` (PSALM's protocol). A reference may name several objects or,
    with an empty list or -1, none. Phrase ids read ``reference id:sentence id``; ``name`` starts the keys. Beyond the
    release, a sentence may have a "kind", for break-downs, and an "explanation", which training answers may say.
    ``targets_only`` leaves out the references that name nothing.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        images: str,
        refs: str,
        instances: str,
        grouping: Grouping | None = None,
        targets_only: bool = False,
        name: str = "refer",
    ) -> None:
        if grouping not in (None, *get_args(Grouping)):
            raise UserError(f"source refer: grouping: {grouping!r} must be 'image', 'sentence' or 'reference'")
        self.prefix, self.images = f"{name}/{split}", data_path(root, images)
        self.path, refs_path = data_path(root, instances), data_path(root, refs)
        data = read_records(self.path)
        self.categories: Categories | None = read_categories(data, str(self.path))
        self.index = category_index(self.categories)
        chosen = _of_split(read_records(refs_path), split, str(refs_path))
        catalogue = _Catalogue(data, self.index, str(self.path))
        by_image = _phrases_by_image(chosen, catalogue, str(refs_path))
        if targets_only:
            kept = {image: [p for p in phrases if p["objects"]] for image, phrases in by_image.items()}
            by_image = {image: phrases for image, phrases in kept.items() if phrases}
        grouping = grouping or ("image" if split.startswith("train") else "sentence")
        self.records = Packed(
            record
            for image_id, phrases in by_image.items()
            for record in _records(phrases, grouping, catalogue.images[image_id], catalogue.annotations)
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        image, annotations = record["image"], record["annotations"]
        size, where = (image["height"], image["width"]), f"{self.path}: image {image['id']}"
        rles = tuple(
            rle_from_segmentation(a["segmentation"], size, f"{where} annotation {a['id']}") for a in annotations
        )
        return Sample(
            key=f"{self.prefix}/{image['id']}-{record['part']}",
            images=(self.images / image["file_name"],),
            size=size,
            masks=Masks(size, rles),
            instances=tuple(
                Instance(row, self.index[a["category_id"]], bool(a["iscrowd"]), a["id"])
                for row, a in enumerate(annotations)
            ),
            categories=self.categories,
            phrases=tuple(Phrase(**phrase) for phrase in record["phrases"]),
            image_id=image["id"],
        )

    def texts(self, index: int) -> tuple[str, ...]:
        """``<image>`` and the expressions of a sample, each with its explanation."""
        return (IMAGE, *(phrase["text"] + phrase["explanation"] for phrase in self.records[index]["phrases"]))


class _Catalogue:
    """Images and annotations of an instances file by id."""

    def __init__(self, data: Any, index: Mapping[int, int], where: str) -> None:
        self.where = where
        self.images = read_images(data, where)
        rows = {field(row, "id", where): row for row in records(data, "annotations", where)}
        self.annotations = {
            key: {**slim_annotation(row, index, f"{where}: image {row.get('image_id')}"), "image": row.get("image_id")}
            for key, row in rows.items()
        }

    def objects(self, value: Any, image: Any, place: str) -> tuple[Any, ...]:
        """Annotation ids a reference names; UserError for an unknown one or one of another image."""
        ids = tuple(dict.fromkeys(i for i in (value if isinstance(value, list | tuple) else [value]) if i != -1))
        for annotation in ids:
            if annotation not in self.annotations:
                raise UserError(
                    f"{place}: ann_id {annotation!r} is not in {self.where}: every reference names an annotation of "
                    f"that file, or -1 for none; use the instances file that came with these references"
                )
            if self.annotations[annotation]["image"] != image:
                raise UserError(
                    f"{place}: ann_id {annotation!r} lies on image {self.annotations[annotation]['image']!r}, the "
                    f"reference is about image {image!r}; correct one of them"
                )
        return ids


def _of_split(refs: Any, split: str, where: str) -> list[Record]:
    if not isinstance(refs, list):
        raise UserError(f"{where}: expected a list of references, found a {type(refs).__name__}")
    splits = {str(field(ref, "split", f"{where}: reference {i}")) for i, ref in enumerate(refs)}
    if split not in splits:
        raise UserError(f"{where}: split {split!r} has no reference{did_you_mean(split, splits)}")
    return [ref for ref in refs if ref["split"] == split]


def _phrases_by_image(refs: list[Record], catalogue: _Catalogue, where: str) -> dict[Any, list[Record]]:
    """Phrases per image in order of appearance, each unique lower-cased sentence of the same objects once."""
    out: dict[Any, list[Record]] = {}
    seen: set[tuple[Any, ...]] = set()
    for ref in refs:
        place = f"{where}: reference {field(ref, 'ref_id', where)}"
        image = field(ref, "image_id", place)
        if image not in catalogue.images:
            raise UserError(
                f"{place}: image_id {image!r} is not listed in {catalogue.where}; use its own instances file"
            )
        objects = catalogue.objects(field(ref, "ann_id", place), image, place)
        kind = "no-target" if not objects else "several" if len(objects) > 1 else ""
        for number, sentence in enumerate(records(ref, "sentences", place)):
            text = str(field(sentence, "sent", place)).strip().lower()
            if (image, objects, text) in seen:
                continue
            seen.add((image, objects, text))
            phrase_id = f"{ref['ref_id']}:{sentence.get('sent_id', number)}"
            phrase = {"text": text, "objects": objects, "id": phrase_id, "kind": sentence.get("kind", kind)}
            out.setdefault(image, []).append({**phrase, "explanation": str(sentence.get("explanation") or "")})
    return out


def _records(
    phrases: list[Record], grouping: Grouping, image: Record, annotations: Mapping[Any, Record]
) -> list[Record]:
    """The samples of one image: its phrases in parts, each with the objects it names."""
    if grouping == "sentence":
        parts = [[phrase] for phrase in phrases]
        names = [phrase["id"].replace(":", "-") for phrase in phrases]
    elif grouping == "reference":
        whole: dict[str, list[Record]] = {}
        for phrase in phrases:
            whole.setdefault(phrase["id"].rpartition(":")[0], []).append(phrase)
        parts, names = list(whole.values()), list(whole)
    else:
        ordered = _different_objects_first(phrases)
        cuts = np.array_split(np.arange(len(ordered)), -(-len(ordered) // MAX_PHRASES))
        parts = [[ordered[i] for i in cut] for cut in cuts]
        names = [str(i) for i in range(len(parts))]
    return [_record(part, name, image, annotations) for part, name in zip(parts, names, strict=True)]


def _different_objects_first(phrases: Sequence[Record]) -> list[Record]:
    """Order so that the first sentences of all objects come before any object's second one."""
    turn: dict[Any, int] = {}
    rounds = []
    for phrase in phrases:
        rounds.append(turn.get(phrase["objects"], 0))
        turn[phrase["objects"]] = rounds[-1] + 1
    return [phrases[i] for i in np.argsort(rounds, kind="stable")]


def _record(part: list[Record], name: str, image: Record, annotations: Mapping[Any, Record]) -> Record:
    rows = {key: row for row, key in enumerate(dict.fromkeys(key for phrase in part for key in phrase["objects"]))}
    phrases = []
    for phrase in part:
        kept = {key: value for key, value in phrase.items() if key != "objects"}
        phrases.append({**kept, "instances": tuple(rows[key] for key in phrase["objects"])})
    return {"image": image, "part": name, "annotations": [annotations[key] for key in rows], "phrases": phrases}
