"""Grounded captions in the layouts of GranD-f (GLaMM): GranDf and OpenPSG, RefCOCOg, Flickr, and the val/test files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xseg.data.records import Packed, field, read_records, records
from xseg.errors import UserError
from xseg.geometry.masks import rle_from_segmentation
from xseg.geometry.views import read_size
from xseg.paths import data_path
from xseg.tokens import IMAGE, P_CLOSE, P_OPEN
from xseg.types import Categories, Instance, Masks, Phrase, Sample, Size, Turn

WORDS = 3
"""Flickr: shorter captions are left out, as the release's own reader does."""


class Span(NamedTuple):
    """Words of a caption, where they stand (start -1 = nowhere) and the masks they are about."""

    text: str
    start: int
    end: int
    segmentations: Sequence[Any]


class Source:
    """One sample per caption: an assistant turn with ``<p>`` spans, and a phrase with its masks per span.

    ``json`` is a file of a training set; its layout is seen from its records::

        GranDf, OpenPSG   [{file_name, caption, groundings: {phrase: {token_positives: [start, end], rle_masks}}}]
        RefCOCOg          [{key: {img_file_name, caption, refs: [{sentence, segmentation}]}}]
        Flickr            {images: [{file_name, caption, …}], annotations: [{image_id, tokens_positive, sam_mask}]}

    or, for val and test, ``captions`` {images: [{id}], annotations: [{image_id, caption, labels}]} and ``masks``
    {annotations: [{image_id, segmentation}]}, the k-th mask of an image being that of its k-th label, over ``id.jpg``.
    Captions are lower-cased and lose the quotation marks around them; spans are sorted, and of two that overlap the
    later one is dropped (X-SAM's rule). RefCOCOg's sentences and the labels are found in the caption as substrings. A
    training sentence that is not found is dropped; a label that is not found keeps its masks, as a phrase after those
    of the spans, because recall counts it.
    """

    categories: Categories | None = None

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        images: str,
        json: str | None = None,
        captions: str | None = None,
        masks: str | None = None,
        name: str = "gcg",
    ) -> None:
        if (json is None) == (captions is None) or (captions is None) != (masks is None):
            raise UserError("source gcg: give either the option 'json', or 'captions' and 'masks' together")
        self.prefix, self.images = f"{name}/{split}", data_path(root, images)
        self.path = data_path(root, str(json or captions))
        data = read_records(self.path)
        if captions is not None:
            rows = _val_records(data, self.path, data_path(root, str(masks)))
        elif isinstance(data, list):
            rows = data
        else:
            rows = _flickr_records(data, str(self.path))
        self.records = Packed(rows)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        where = f"{self.path}: record {index % len(self)}"
        file, caption, found = _read(self.records[index], where)
        spans = _without_overlaps(found)
        image = self.images / file
        groups = [*spans, *(span for span in found if span.start < 0)]
        segmentations = [s for span in groups for s in span.segmentations]
        size = _size(segmentations, image, where)
        rles = tuple(rle_from_segmentation(s, size, where) for s in segmentations)
        phrases: list[Phrase] = []
        for number, span in enumerate(groups):
            first = sum(len(p.instances) for p in phrases)
            rows = tuple(range(first, first + len(span.segmentations)))
            phrases.append(Phrase(_lower(span.text).strip(), rows, f"{index % len(self)}:{number}"))
        return Sample(
            key=f"{self.prefix}/{index % len(self):06d}",
            images=(image,),
            size=size,
            masks=Masks(size, rles),
            instances=tuple(Instance(row, -1) for row in range(len(rles))),
            phrases=tuple(phrases),
            turns=(Turn("assistant", _tagged(caption, spans)),),
            image_id=image.stem,
        )

    def texts(self, index: int) -> tuple[str, ...]:
        """``<image>`` and the caption of a sample."""
        return (IMAGE, _read(self.records[index], f"{self.path}: record {index}")[1])

    def outlines(self, index: int) -> Iterator[tuple[str, Any]]:
        """(place, [x1, y1, x2, y2, …]) of every polygon as annotated."""
        where = f"{self.path}: record {index}"
        for span in _read(self.records[index], where)[2]:
            for segmentation in span.segmentations:
                if isinstance(segmentation, list):
                    yield from ((f"{where}: {span.text!r}", polygon) for polygon in segmentation)


def _read(record: Any, where: str) -> tuple[str, str, list[Span]]:
    """Image file, caption and spans of a record of any layout."""
    if isinstance(record, Mapping) and len(record) == 1:
        record = next(iter(record.values()))  # RefCOCOg: {key: record}
    caption = field(record, "caption", where)
    if not isinstance(caption, str):
        raise UserError(f"{where}: caption: {caption!r} must be a text; repair the record")
    if "annotations" not in record:
        # the release's places count from behind the quotation mark; Flickr's captions have none
        caption = caption.strip('"').strip()
    if "groundings" in record:
        return str(field(record, "file_name", where)), caption, _psg_spans(record, caption, where)
    if "refs" in record:
        refs = records(record, "refs", where)
        named = [(str(field(r, "sentence", where)), [field(r, "segmentation", where)]) for r in refs]
        spans = [span for span in _searched(named, caption) if span.start >= 0]
        return str(field(record, "img_file_name", where)), caption, spans
    if "labels" in record:
        pairs = zip(record["labels"], record["segmentations"], strict=True)
        return record["file_name"], caption, _searched([(text, [mask]) for text, mask in pairs], caption)
    rows = records(record, "annotations", where)
    spans = []
    for row in rows:
        if row.get("ignore", False):
            continue
        positions = field(row, "tokens_positive", where)
        place = positions[0] if isinstance(positions, list) and positions else positions
        spans.append(_span(caption, place, [field(row, "sam_mask", where)], where))
    return str(field(record, "file_name", where)), caption, _merged(spans)


def _psg_spans(record: Any, caption: str, where: str) -> list[Span]:
    groundings = field(record, "groundings", where)
    if not isinstance(groundings, Mapping):
        raise UserError(f"{where}: 'groundings' is a {type(groundings).__name__}, it must map phrases to their masks")
    out = []
    for phrase, grounding in groundings.items():
        place = f"{where}: {str(phrase)!r}"
        out.append(
            _span(caption, field(grounding, "token_positives", place), records(grounding, "rle_masks", place), place)
        )
    return out


def _span(caption: str, place: Any, segmentations: Sequence[Any], where: str) -> Span:
    if not isinstance(place, list) or len(place) != 2 or not all(isinstance(v, int) for v in place):
        raise UserError(f"{where}: {place!r} must be [start, end] of characters in the caption; repair the record")
    start, end = place
    if not 0 <= start < end <= len(caption):
        raise UserError(
            f"{where}: characters {start} to {end} of a caption of {len(caption)}: a span lies inside its caption and "
            f"is not empty; repair the record"
        )
    return Span(caption[start:end], start, end, segmentations)


def _searched(named: Sequence[tuple[str, Sequence[Any]]], caption: str) -> list[Span]:
    """Find each text in the caption, the second one of two equal texts at the second place."""
    low, taken, out = _lower(caption), set(), []
    for text, segmentations in named:
        wanted = _lower(text).strip()
        start = low.find(wanted) if wanted else -1
        while start in taken and start >= 0:
            start = low.find(wanted, start + 1)
        taken.add(start)
        out.append(Span(text, start, start + len(wanted), segmentations))
    return out


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Spans of the same place as one with all their masks (Flickr: a row per box)."""
    by_place: dict[tuple[int, int], list[Any]] = {}
    for span in spans:
        by_place.setdefault((span.start, span.end), []).extend(span.segmentations)
    texts = {(span.start, span.end): span.text for span in spans}
    return [Span(texts[place], *place, segmentations) for place, segmentations in by_place.items()]


def _without_overlaps(spans: Sequence[Span]) -> list[Span]:
    out: list[Span] = []
    for span in sorted((s for s in spans if s.start >= 0), key=lambda s: (s.start, s.end)):
        if span.segmentations and (not out or span.start >= out[-1].end):
            out.append(span)
    return out


def _tagged(caption: str, spans: Sequence[Span]) -> str:
    text, last = "", 0
    for span in spans:
        inside = caption[span.start : span.end].strip()
        text += f"{_lower(caption[last : span.start])}{P_OPEN}{_lower(inside)}{P_CLOSE}"
        last = span.end
        if caption[span.start : span.end] != caption[span.start : span.end].rstrip():
            text += " "
    return (text + _lower(caption[last:])).strip()


def _lower(text: str) -> str:
    """Lower case that keeps every character's place."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _size(segmentations: Sequence[Any], image: Path, where: str) -> Size:
    """The image's size: that of the first RLE, or of the file where all masks are polygons."""
    for segmentation in segmentations:
        if isinstance(segmentation, Mapping):
            height, width = field(segmentation, "size", where)
            return int(height), int(width)
    return read_size(image, where)


def _flickr_records(data: Any, where: str) -> list[dict[str, Any]]:
    by_image: dict[Any, list[Any]] = {}
    for number, row in enumerate(records(data, "annotations", where)):
        by_image.setdefault(field(row, "image_id", f"{where}: annotations[{number}]"), []).append(row)
    keys = ("tokens_positive", "sam_mask", "ignore")
    out = []
    for number, image in enumerate(records(data, "images", where)):
        place = f"{where}: images[{number}]"
        rows = by_image.pop(field(image, "id", place), [])
        record = {"file_name": field(image, "file_name", place), "caption": field(image, "caption", place)}
        if len(str(record["caption"]).split(" ")) < WORDS:
            continue
        out.append({**record, "annotations": [{k: row[k] for k in keys if k in row} for row in rows]})
    if by_image:
        raise UserError(f"{where}: annotations of image_id {next(iter(by_image))!r}, which 'images' does not list")
    return out


def _val_records(data: Any, path: Path, masks_path: Path) -> list[dict[str, Any]]:
    masks: dict[Any, list[Any]] = {}
    for number, row in enumerate(records(read_records(masks_path), "annotations", str(masks_path))):
        place = f"{masks_path}: annotations[{number}]"
        masks.setdefault(field(row, "image_id", place), []).append(field(row, "segmentation", place))
    out = []
    for number, row in enumerate(records(data, "annotations", str(path))):
        place = f"{path}: annotations[{number}]"
        image, labels = field(row, "image_id", place), field(row, "labels", place)
        found = masks.get(image, [])
        if len(found) != len(labels):
            raise UserError(
                f"{place}: {len(labels)} labels, but {masks_path} has {len(found)} masks of image {image!r}: the k-th "
                f"mask is that of the k-th label; use the two files of one split"
            )
        caption = field(row, "caption", place)
        out.append({"file_name": f"{image}.jpg", "caption": caption, "labels": labels, "segmentations": found})
    return out
